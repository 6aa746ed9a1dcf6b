"""The tokens that heads raise and lower: their output through the unembedding."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.measures.head_outputs import HeadOutputs, bridged, by_length
from interp.analyses.registry import analysis
from interp.analyses.results.codec import result
from interp.analyses.results.result import Result
from interp.analyses.tasks import standard
from interp.analyses.views._tokens import (
    Place,
    Token,
    Writes,
    chosen_heads,
    labels_of,
    place_of_head,
    place_of_prompt,
    read_at,
    texts_of,
)
from interp.analyses.views.attention_lens import Lens, extremes
from interp.errors import ScoreError, UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts


@result
@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Result):
    """The tokens that heads raise and lower most, in each of some prompts."""

    heads: tuple[str, ...]
    labels: tuple[str, ...]
    """one for each prompt"""
    query_ids: Int[Tensor, "n"]
    """token at which each prompt was read"""
    query_positions: Int[Tensor, "n"]
    raised_ids: Int[Tensor, "n h k"]
    """the most raised tokens first"""
    raised_logits: Float[Tensor, "n h k"]
    lowered_ids: Int[Tensor, "n h k"]
    """the most lowered tokens first"""
    lowered_logits: Float[Tensor, "n h k"]
    texts: dict[str, str]
    """token id -> its text"""
    lens: int | None = None
    """layer whose heads were read through a trained lens"""
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        for name in ("raised", "lowered"):
            for part in ("ids", "logits"):
                shape = tuple(getattr(self, f"{name}_{part}").shape)
                if shape[:2] != (len(self.labels), len(self.heads)):
                    raise ScoreError(
                        f"{name}_{part} has the shape {list(shape)} for {len(self.labels)} prompts and "
                        f"{len(self.heads)} heads; give one row for each of them."
                    )

    @property
    def queries(self) -> tuple[Place, ...]:
        """Token and position at which each prompt was read."""
        pairs = zip(self.query_ids.tolist(), self.query_positions.tolist(), strict=True)
        return tuple(Place(self.texts[str(token)], token, position) for token, position in pairs)

    @property
    def raised(self) -> tuple[tuple[tuple[Token, ...], ...], ...]:
        """Tokens by prompt, head and rank, the most raised first."""
        return Writes(self.raised_ids, self.raised_logits).tokens(self.texts)

    @property
    def lowered(self) -> tuple[tuple[tuple[Token, ...], ...], ...]:
        """Tokens by prompt, head and rank, the most lowered first."""
        return Writes(self.lowered_ids, self.lowered_logits).tokens(self.texts)

    def of(self, head: Any, prompt: int = 0) -> tuple[Token, ...]:
        """The tokens that one head raises, the most raised first.

        Args:
            head: One of `heads`.
            prompt: Number of the prompt.

        Raises:
            HeadError: For a head that is not in this view.
            UsageError: For a prompt that is not in this view.
        """
        return self.raised[place_of_prompt(prompt, self.labels)][place_of_head(head, self.heads)]

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each token: prompt, head, side, rank, token, id, logit."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"prompt": label, "head": head, "side": side, "rank": rank, "token": text, "id": token, "logit": logit}
                for side in ("raised", "lowered")
                for label, heads in zip(self.labels, getattr(self, side), strict=True)
                for head, tokens in zip(self.heads, heads, strict=True)
                for rank, (text, token, logit) in enumerate(tokens, 1)
            ]
        )

    def summary(self, top: int = 10) -> str:
        """The tokens that each head raises most in each prompt.

        Args:
            top: Number of heads to list.
        """
        lines = []
        for label, heads in zip(self.labels, self.raised, strict=True):
            lines.append(f"{label}: tokens that heads raise")
            for head, tokens in list(zip(self.heads, heads, strict=True))[:top]:
                lines.append(f"  {head:8s} {', '.join(f'{token.text!r} {token.logit:+.2f}' for token in tokens[:5])}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"LogitLens({', '.join(self.heads)}; top {self.raised_ids.shape[-1]} of {len(self.labels)} prompts)"


@analysis(
    title="Tokens that heads raise", group="views", order=33, prompts=standard.few_needles, joint=True, in_all=False,
    needs=("heads",), inputs=lambda run: {"heads": HeadSet(tuple(run.leading))},
)  # fmt: skip
def logit_lens(
    model: nn.Module,
    prompts: Prompts,
    heads: Any,
    *,
    k: int = 10,
    queries: str = "last",
    lens: Lens | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> LogitLens:
    """List the tokens whose logits a head raises and lowers most, in each prompt.

    `logit[b h v] = ((z[b h d] W_O[h d m]) / s[b] * gamma[m]) . W_U[m v]`, where s is the scale of the final norm in
    this run.

    LayerNorm centres the head's output, and a norm after attention (Gemma 2 and 3, OLMo 2) is applied with its scale in
    this run. Logits are taken before a soft-cap or a scale of the model's logits, and without any bias. A number that
    is added to all tokens alike changes no probability, so compare tokens with each other.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Any prompts.
        heads: Heads, as `HeadSet.parse` takes them.
        k: Number of tokens to list on each side.
        queries: Position that is read: "last", or the name of a span, of which the last token is read. Later tokens are
            not read.
        lens: A trained map; heads of its layer go through it instead of `W_U`. Compare with the view without it.
        batch_size: Number of prompts per forward pass.
        progress: Show a progress bar.

    Returns:
        LogitLens: int64 ids and float32 logits `[n h k]`, in logits.

    Raises:
        HeadError: For no heads, or heads that the model does not have.
        SpanError: If a prompt has no span `queries`.
        UsageError: For a `k` outside of the vocabulary, or a lens of a layer of which no head is given.
        ScoreError: For a lens of another model.
        ModelError: If the model has no bridge or is in training mode, or if its heads do not add up to the output of
            attention.

    Examples:
        >>> from interp.analyses.views.logit_lens import logit_lens
        >>> view = logit_lens(model, prompts, "L1H2", k=3)
        >>> view.raised_ids.shape
        torch.Size([2, 1, 3])

    Source:
        nostalgebraist 2020 (logit lens) for single heads; `lens`: Sakarvadia et al. 2310.16270.

    Limits:
        Does not show the effect of a head through later layers. A head that writes for them raises tokens without a
        visible meaning.
    """
    layout = HeadLayout.of(model)
    chosen = chosen_heads(heads, layout)
    if lens is not None:
        lens.check(model)
        if lens.layer not in chosen.by_layer():
            raise UsageError(
                f"the lens is of layer {lens.layer}, where none of the heads {chosen} is; give a head of that layer."
            )
    read, places = read_at(model, prompts, queries)
    shape = len(prompts), len(chosen), k
    sides = [Writes(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)) for _ in range(2)]
    bar = tqdm(total=len(prompts), desc="logit_lens", disable=not progress, delay=2, leave=False)
    with bar, bridged(model) as tl, torch.no_grad():
        for index, (batch,) in by_length(read, batch_size=batch_size):
            run = HeadOutputs.of(tl, batch, layout)
            run.check_readout(run.logits.topk(2).indices)
            for place, head in enumerate(chosen):
                x = run.read(run.heads[head][None])[0]
                weight, bias = (tl.W_U, None) if lens is None or head.layer != lens.layer else lens.of(head)
                up, down, _ = extremes(x, weight.to(x.device), bias, k)
                for side, top in zip(sides, (up, down), strict=True):
                    side.ids[index, place], side.logits[index, place] = Writes.of(top)
            bar.update(len(index))
    (raised_ids, raised_logits), (lowered_ids, lowered_logits) = sides
    query_ids = torch.tensor([place.id for place in places])
    return LogitLens(
        heads=tuple(map(str, chosen)),
        labels=labels_of(prompts),
        query_ids=query_ids,
        query_positions=torch.tensor([place.position for place in places]),
        raised_ids=raised_ids,
        raised_logits=raised_logits,
        lowered_ids=lowered_ids,
        lowered_logits=lowered_logits,
        texts=texts_of(prompts.tokenizer, query_ids, raised_ids, lowered_ids),
        lens=None if lens is None else lens.layer,
        provenance=Provenance.of(model, prompts.tokenizer),
    )
