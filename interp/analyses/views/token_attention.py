"""Attention on the tokens of one prompt, from the last token, for some heads."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.registry import analysis
from interp.analyses.results.codec import result
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.analyses.tasks import standard
from interp.errors import HeadError, ScoreError
from interp.hooks.generate import generate
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import capture, run
from interp.hooks.read.keep import rows

N_HEADS = 8
"""heads that are shown where scores are given"""
MARKED = ("answer", "needle")
"""spans that are marked by default"""


@result
@dataclass(frozen=True, eq=False, repr=False)
class TokenAttention(Result):
    """Attention of one query on the tokens of a prompt, for some heads."""

    title: str
    tokens: tuple[str, ...]
    """text of each token; joined they are the rendered prompt"""
    heads: tuple[str, ...]
    """names of the heads, in the order to show"""
    weights: Float[Tensor, "h k"]
    """attention of the query on each token"""
    marks: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """named ranges of tokens, such as the answer"""
    reply: str = ""
    """text that the model generated from this query on"""
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        expected = len(self.heads), len(self.tokens)
        if tuple(self.weights.shape) != expected:
            raise ScoreError(
                f"the weights of {self.title!r} have the shape {list(self.weights.shape)}, expected {list(expected)}; "
                "give one row for each head and one number for each token."
            )

    def on(self, mark: str) -> Float[Tensor, "h"]:
        """Attention of each head on a marked range.

        Args:
            mark: One of `marks`.
        """
        return sum((self.weights[:, start:stop].sum(-1) for start, stop in self.marks[mark]), self.weights[:, 0] * 0)

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each token: position, token, and a column for each head."""
        import pandas as pd

        columns = {head: row.numpy() for head, row in zip(self.heads, self.weights, strict=True)}
        return pd.DataFrame({"position": range(len(self.tokens)), "token": list(self.tokens), **columns})

    def summary(self, top: int = 10) -> str:
        """The most attended tokens of each head.

        Args:
            top: Number of heads to list.
        """
        lines = [f"attention on {self.title!r}, {len(self.tokens)} tokens: the most attended tokens of each head"]
        for head, row in list(zip(self.heads, self.weights, strict=True))[:top]:
            best = row.nan_to_num(-1.0).topk(min(3, len(row)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            lines.append(f"  {head:8s} {', '.join(f'{self.tokens[i]!r} at {i} ({w:.2f})' for i, w in pairs)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"TokenAttention({self.title!r}, {len(self.tokens)} tokens, {', '.join(self.heads)})"


@analysis(
    title="Attention at the start of a reply", group="views", order=35, prompts=standard.one_needle, joint=True,
    in_all=False, automatic=True, needs=("retrieval",), inputs=lambda run: {"heads": run.scores["retrieval"]},
    max_new_tokens=REPLY_TOKENS,
)  # fmt: skip
def token_attention(
    model: nn.Module, prompts: Prompts, heads: Any, *, max_new_tokens: int = REPLY_TOKENS, stop: str = "\n"
) -> TokenAttention:
    """Read the attention of some heads at the last token of one prompt, where the model begins its reply.
    `interp score` shows the 8 heads with the highest retrieval scores.

    `weights[h k] = pattern[h q k]` with q the last token; only these rows are computed.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts, of which one is shown.
        heads: HeadScores of these prompts, of which the best 8 heads are shown on the shortest prompt that counts; or
            heads as `HeadSet.parse` takes them, which are shown in the given order on the first prompt.
        max_new_tokens: Number of tokens to generate for the reply.
        stop: Text at which the reply ends.

    Returns:
        TokenAttention: float32 `weights [h k]`, in shares of attention (0 to 1).

    Raises:
        HeadError: For no heads, heads that the model does not have, or scores of which none is above 0.

    Examples:
        >>> from interp.analyses.views.token_attention import token_attention
        >>> token_attention(model, prompts, "L1H2, L0H1").weights.shape
        torch.Size([2, 17])

    Source:
        This package.

    Limits:
        Shows one query of one prompt. Does not show that the model needs the attended tokens.
    """
    shown, names = _shown(prompts, heads)
    layout = HeadLayout.of(model)
    chosen = HeadSet.parse(names, layout)
    order = [Head.parse(name) for name in names] if isinstance(names, list) else list(chosen)
    if not order:
        raise HeadError('no heads were given; name at least one, as in "L5H3".')
    prompt, one = prompts[shown], prompts[shown : shown + 1]
    with capture(model, rows(), one, heads=chosen, queries=[len(prompt) - 1]) as cap:
        run(model, one, logits_to_keep=1)
    pattern = cap[rows()][0, :, 0].float().cpu()
    tokenizer = prompts.tokenizer
    (reply,) = generate(model, one, max_new_tokens=max_new_tokens, stop=stop)
    return TokenAttention(
        title=str(prompt.meta.get("question", "one prompt")),
        tokens=tuple(tokenizer.decode([token]) if tokenizer else str(token) for token in prompt.ids),
        heads=tuple(map(str, order)),
        weights=pattern[[list(chosen).index(head) for head in order]],
        marks={name: tuple(prompt.spans[name]) for name in MARKED if name in prompt.spans},
        reply=reply.text,
        provenance=Provenance.of(model, tokenizer),
    )


def _shown(prompts: Prompts, heads: Any) -> tuple[int, Any]:
    """The number of the prompt to show, and the heads: a list where they have an order."""
    if isinstance(heads, HeadScores):
        if not len(heads.heads(top=N_HEADS, above=0.0)):
            raise HeadError(f"no head of '{heads.name}' scores above 0; give heads by name.")
        counted = (~heads.per_prompt.flatten(1).isnan()).any(1).tolist()
        return min(range(len(prompts)), key=lambda i: (not counted[i], len(prompts[i]))), heads.top(N_HEADS)
    ordered = isinstance(heads, list | tuple) and all(isinstance(head, str | Head) for head in heads)
    return 0, list(heads) if ordered else heads
