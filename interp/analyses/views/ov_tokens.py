"""The tokens that a head would write for one attended token alone: its OV circuit on a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    short,
    stacked,
    texts_of,
)
from interp.analyses.views.attention_lens import extremes
from interp.errors import ModelError, ScoreError, SpanError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.batch_spans import TokenSpan
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import capture
from interp.hooks.read.keep import rows, v
from interp.hooks.read.reductions import normalize_spans

N_COPIED = 5
"""a head copies a token that is among so many of the first that it writes for it"""
N_LAST = 8
"""tokens at the end of a prompt that are read where it has no answer"""


class Reading(NamedTuple):
    """The output of a head if it attended to one token alone."""

    token: Place
    attention: float
    """attention of the query on the token in this run"""
    rank: int
    """rank of the token itself among all tokens that are written, 0 for the most raised"""
    writes: tuple[Token, ...]


@result
@dataclass(frozen=True, eq=False, repr=False)
class OvTokens(Result):
    """The tokens that heads would write for each token of a span, in each of some prompts."""

    heads: tuple[str, ...]
    labels: tuple[str, ...]
    """one for each prompt"""
    query_ids: Int[Tensor, "n"]
    """token from whose run the attention and the scales of the norms are"""
    query_positions: Int[Tensor, "n"]
    span: str
    ids: Int[Tensor, "n t"]
    """tokens of the span; -1 where a prompt has fewer"""
    positions: Int[Tensor, "n t"]
    attention: Float[Tensor, "n h t"]
    ranks: Int[Tensor, "n h t"]
    """rank of the token itself among all tokens that the head writes for it"""
    written_ids: Int[Tensor, "n h t k"]
    written_logits: Float[Tensor, "n h t k"]
    texts: dict[str, str]
    """token id -> its text"""
    from_last: bool = False
    """whether each query is the last token of its prompt"""
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        expected = len(self.labels), len(self.heads), self.ids.shape[-1]
        for name in ("attention", "ranks", "written_ids", "written_logits"):
            shape = tuple(getattr(self, name).shape)
            if shape[:3] != expected:
                raise ScoreError(
                    f"{name} has the shape {list(shape)}, expected {list(expected)} first; give one row for each "
                    "prompt, head and token."
                )

    @property
    def queries(self) -> tuple[Place, ...]:
        """Token and position at which each prompt was read."""
        pairs = zip(self.query_ids.tolist(), self.query_positions.tolist(), strict=True)
        return tuple(Place(self.texts[str(token)], token, position) for token, position in pairs)

    def of(self, head: Any, prompt: int = 0) -> tuple[Reading, ...]:
        """For each token of the span, the tokens that one head would write.

        Args:
            head: One of `heads`.
            prompt: Number of the prompt.

        Raises:
            HeadError: For a head that is not in this view.
            UsageError: For a prompt that is not in this view.
        """
        n, h = place_of_prompt(prompt, self.labels), place_of_head(head, self.heads)
        known = self.ids[n] >= 0
        written = Writes(self.written_ids[n, h, known], self.written_logits[n, h, known]).tokens(self.texts)
        numbers = (part[known].tolist() for part in (self.ids[n], self.positions[n]))
        places = [Place(self.texts[str(token)], token, position) for token, position in zip(*numbers, strict=True)]
        shares = [short(share) for share in self.attention[n, h, known].tolist()]
        return tuple(map(Reading, places, shares, self.ranks[n, h, known].tolist(), written))

    def copying(self, head: Any, top: int = N_COPIED) -> float:
        """Share of the span's tokens, over all prompts, that are among the first tokens that the head writes for them.

        Args:
            head: One of `heads`.
            top: Number of tokens that count as the first.
        """
        ranks = self.ranks[:, place_of_head(head, self.heads)][self.ids >= 0]
        return int((ranks < top).sum()) / len(ranks)

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each token of the span and head."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "prompt": label, "head": head, "position": reading.token.position, "token": reading.token.text,
                    "attention": reading.attention, "rank": reading.rank,
                    "writes": " ".join(repr(token.text) for token in reading.writes),
                }
                for number, label in enumerate(self.labels)
                for head in self.heads
                for reading in self.of(head, number)
            ]
        )  # fmt: skip

    def summary(self, top: int = 10) -> str:
        """For each head its share of copied tokens, and what it writes for the most attended token of each prompt.

        Args:
            top: Number of heads to list.
        """
        lines = [f"tokens of {self.span}: share that is among the first {N_COPIED} that a head writes for them"]
        for head in self.heads[:top]:
            lines.append(f"  {head:8s} {self.copying(head):4.0%}")
            for number in range(len(self.labels)):
                most = max(self.of(head, number), key=lambda reading: reading.attention)
                written = ", ".join(repr(token.text) for token in most.writes)
                lines.append(f"    {most.token.text!r} ({most.attention:.2f}) -> {written}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"OvTokens({', '.join(self.heads)}; {self.span} of {len(self.labels)} prompts)"


@analysis(
    title="Tokens that heads would write", group="views", order=34, prompts=standard.explored,
    own_prompts=standard.longest, joint=True, in_all=False, automatic=True, needs=("heads",),
    inputs=lambda run: {"heads": HeadSet(tuple(run.leading))},
)  # fmt: skip
def ov_tokens(
    model: nn.Module,
    prompts: Prompts,
    heads: Any,
    span: Any = None,
    *,
    k: int = 5,
    queries: str = "last",
    batch_size: int = 8,
    progress: bool = False,
) -> OvTokens:
    """For each token of a span, list the tokens whose logits the head's output at the query would raise most if it
    attended to that token alone.

    `logit[b h k v] = ((v[b h k d] W_O[h d m]) / s[b] * gamma[m]) . W_U[m v]`, with the values v of this run; the values
    of a kv head serve its group.

    The norms are those of `logit_lens`, with the scales of the query's position, so that the sum over all k of
    `pattern[b h q k] logit[b h k v]` is the logit that `logit_lens` gives there.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Any prompts.
        heads: Heads, as `HeadSet.parse` takes them.
        span: Name of a span, a position, or a range (start, stop). By default "answer" where all prompts have it, else
            the last 8 tokens. Tokens after the query are left out.
        k: Number of tokens to list for each token of the span.
        queries: Position of the query; "last" is the last token of the prompt. Other positions as in `logit_lens`.
        batch_size: Number of prompts per forward pass.
        progress: Show a progress bar.

    Returns:
        OvTokens: int64 `written_ids` and float32 `written_logits [n h t k]`, in logits; `copying(head)` is the share of
        tokens that are among the first five written for them.

    Raises:
        HeadError: For no heads, or heads that the model does not have.
        SpanError: If a prompt has no token of the span up to the query.
        UsageError: For a `k` outside of the vocabulary.
        ModelError: As `logit_lens`, and if the output of attention is not the sum of its weighted values (a gate after
            it).

    Examples:
        >>> from interp.analyses.views.ov_tokens import ov_tokens
        >>> view = ov_tokens(model, prompts, "L1H2", "first", k=3)
        >>> view.written_ids.shape
        torch.Size([2, 1, 8, 3])

    Source:
        Elhage et al. 2021, OV circuits.

    Differs:
        Uses the value vectors that the head computes on the prompt, not those of the token embeddings alone.

    Limits:
        Does not show whether the head attends to the token; its attention is given for one query only. Does not show
        the effect through later layers.
    """
    layout = HeadLayout.of(model)
    chosen = chosen_heads(heads, layout)
    if span is None and all("answer" in prompt.spans for prompt in prompts):
        span = "answer"
    (where,) = (None,) if span is None else normalize_spans((span,))
    read, places = read_at(model, prompts, queries)
    spans = _positions(prompts, where, [place.position for place in places])
    found: list[Any] = [()] * len(prompts)
    bar = tqdm(total=len(prompts), desc="values", disable=not progress, delay=2, leave=False)
    with bar, bridged(model) as tl, torch.no_grad():
        for index, (batch,) in by_length(read, batch_size=batch_size):
            with (
                capture(tl, v(), batch, heads=chosen) as values,
                capture(tl, rows(), batch, heads=chosen, queries=[batch.lengths[0] - 1]) as looked,
            ):
                run = HeadOutputs.of(tl, batch, layout)
            kept, pattern = values[v()].float(), looked[rows()][:, :, 0].float()
            _check_values(run, chosen, kept, pattern)
            for row, (number, prompt) in enumerate(zip(index, batch, strict=True)):
                one, keys = run.row(row), spans[number]
                ids = torch.tensor([prompt.ids[key] for key in keys])
                written = [_written(one, head, ids, kept[row, i, keys], k) for i, head in enumerate(chosen)]
                found[number] = pattern[row, :, keys].cpu(), *map(torch.stack, zip(*written, strict=True))
            bar.update(len(index))
    attention, ranks, written_ids, written_logits = (
        stacked([one[part] for one in found], fill) for part, fill in enumerate((torch.nan, -1, -1, torch.nan))
    )
    ids = [[prompt.ids[key] for key in keys] for prompt, keys in zip(prompts, spans, strict=True)]
    filled = [stacked([torch.tensor(row)[None] for row in rows_], -1)[:, 0] for rows_ in (ids, spans)]
    query_ids = torch.tensor([place.id for place in places])
    return OvTokens(
        heads=tuple(map(str, chosen)),
        labels=labels_of(prompts),
        query_ids=query_ids,
        query_positions=torch.tensor([place.position for place in places]),
        span=f"last {N_LAST} tokens" if span is None else span if isinstance(span, str) else str(where),
        ids=filled[0],
        positions=filled[1],
        attention=attention,
        ranks=ranks,
        written_ids=written_ids,
        written_logits=written_logits,
        texts=texts_of(prompts.tokenizer, query_ids, filled[0], written_ids),
        from_last=all(place.position + 1 == len(prompt) for place, prompt in zip(places, prompts, strict=True)),
        provenance=Provenance.of(model, prompts.tokenizer),
    )


def _written(
    run: HeadOutputs, head: Head, ids: Int[Tensor, "k"], values: Float[Tensor, "k d"], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank of each token itself, ids and logits of the tokens that a head writes for it."""
    w_o = run.tl.blocks[head.layer].attn.W_O[head.head].float()
    added = run.added(head.layer, (values.to(w_o.device) @ w_o)[:, None])
    top, _, ranks = extremes(run.read(added)[:, 0], run.tl.W_U, None, k, ids)
    written = Writes.of(top)
    return ranks.cpu(), written.ids, written.logits


def _check_values(
    run: HeadOutputs, heads: HeadSet, values: Float[Tensor, "b x k d"], pattern: Float[Tensor, "b x k"]
) -> None:
    summed = torch.einsum("bxk,bxkd->bxd", pattern, values)
    written = torch.stack([run.cache[f"blocks.{head.layer}.attn.hook_z"][:, 0, head.head] for head in heads], 1).cpu()
    eps = torch.finfo(run.tl.W_U.dtype).eps
    if (summed - written).norm() > max(1e-3, 4 * eps) * written.norm():
        raise ModelError(
            "the output of these heads is not the sum of their values weighted by attention, since this model changes "
            "it before the output projection; use logit_lens, which reads the output itself."
        )


def _positions(prompts: Prompts, where: TokenSpan | None, last: Sequence[int]) -> list[list[int]]:
    """The positions of a span in each prompt up to the last one that is read. Raises SpanError."""
    if where is None:
        ranges = [((max(0, end + 1 - N_LAST), end + 1),) for end in last]
    elif isinstance(where, str):
        ranges = prompts.span(where)
    else:
        ranges = [((where, where + 1) if isinstance(where, int) else where,)] * len(prompts)
    found = []
    for number, (spans, end) in enumerate(zip(ranges, last, strict=True)):
        found.append([key for start, stop in spans for key in range(start, min(stop, end + 1))])
        if not found[-1]:
            raise SpanError(
                f"prompt {number} has no token of span {where!r} up to position {end}, where it is read; name a span "
                "that begins before it."
            )
    return found
