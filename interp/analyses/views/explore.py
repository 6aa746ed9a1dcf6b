"""Attention on one long prompt, from all heads down to tokens, kept as reductions."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.analyses.registry import analysis
from interp.analyses.results.codec import result
from interp.analyses.results.result import Result
from interp.analyses.tasks import standard
from interp.errors import CostError, HeadError, PromptError, ScoreError, SpanError, UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import CaptureCost, capture, run
from interp.hooks.read.keep import RankedKeys, at, blocks, entropy, mass, top_keys

MAX_BLOCKS = 96
"""blocks of a map along one side, where no size of a block is given"""
N_CHOSEN, N_LAST_QUERIES, MIN_DISTANCE = 12, 512, 16
"""heads that are chosen by default, queries at the end that choose them, and tokens that count as far back"""
MAX_REPORT_BYTES = 700_000
"""bytes of all block maps in the report of a run"""
SUMMARIES = {
    "first": ("attention on the first token", "share of attention"),
    "previous": ("attention on the previous token", "share of attention"),
    "near": ("attention on the two nearest blocks", "share of attention"),
    "distance": ("mean distance of the keys", "tokens"),
    "entropy": ("entropy of the attention", "nats"),
}
"""summary of a head -> its meaning and its unit"""


@result
@dataclass(frozen=True, eq=False, repr=False)
class Explored(Result):
    """Attention on one prompt: averages and block maps of the heads, and the top keys of chosen heads."""

    title: str
    tokens: tuple[str, ...]
    """text of each token"""
    layout: HeadLayout
    summaries: dict[str, Float[Tensor, "l h"]]
    """name in SUMMARIES -> mean over queries"""
    block: int
    """number of tokens in a block; the last block may have fewer"""
    mapped: HeadSet
    """heads with a block map"""
    maps: Float[Tensor, "i n n"]
    """for each mapped head: mean over the queries of a block of their attention on a block of keys"""
    heads: HeadSet
    """heads with top keys"""
    keys: Int[Tensor, "j q k"]
    """for each of `heads`: the most attended keys of each query, strongest first; -1 where a query sees fewer"""
    probs: Float[Tensor, "j q k"]
    """attention on these keys"""
    marks: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """named ranges of tokens"""
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        n = -(-len(self.tokens) // max(self.block, 1))
        expected = {
            "maps": (self.maps, (len(self.mapped), n, n)),
            "keys": (self.keys, (len(self.heads), len(self.tokens), self.keys.shape[-1])),
            "probs": (self.probs, tuple(self.keys.shape)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ScoreError(
                    f"{name} of an explored prompt has the shape {list(tensor.shape)}, expected {list(shape)}; "
                    "give one map or row of keys for each head."
                )
        if any(not 0 <= a < b <= len(self.tokens) for ranges in self.marks.values() for a, b in ranges):
            raise ScoreError(f"a mark lies outside of the {len(self.tokens)} tokens; give ranges within the prompt.")

    def map(self, head: Any) -> Float[Tensor, "n n"]:
        """Attention of each block of queries on each block of keys.

        Args:
            head: One of `mapped`.

        Raises:
            HeadError: For a head without a block map.
        """
        return self.maps[_place(head, self.mapped, "block map")]

    def top(self, head: Any, query: int) -> list[tuple[int, float]]:
        """The top keys of one query as (position, attention), strongest first.

        Args:
            head: One of `heads`.
            query: Position of the query.

        Raises:
            HeadError: For a head without top keys.
        """
        row = _place(head, self.heads, "top keys")
        pairs = zip(self.keys[row, query].tolist(), self.probs[row, query].tolist(), strict=True)
        return [(key, weight) for key, weight in pairs if key >= 0]

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each head: layer, head, name, and the summaries."""
        import pandas as pd

        heads = list(self.layout.all())
        return pd.DataFrame(
            {
                "layer": [head.layer for head in heads],
                "head": [head.head for head in heads],
                "name": [str(head) for head in heads],
                **{name: table.flatten().numpy() for name, table in self.summaries.items()},
            }
        )

    def summary(self, top: int = 10) -> str:
        """The size of what was read, then for each head with top keys its summaries.

        Args:
            top: Number of heads to list.
        """
        lines = [repr(self)]
        for head in list(self.heads)[:top]:
            numbers = ", ".join(f"{name} {float(table[head]):.3g}" for name, table in self.summaries.items())
            lines.append(f"  {head!s:8s} {numbers}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        named = f"{self.title!r}, " if self.title else ""
        return (
            f"Explored({named}{len(self.tokens):,} tokens in blocks of {self.block}, {len(self.mapped)} of "
            f"{self.layout.size} heads mapped, top {self.keys.shape[-1]} keys of {len(self.heads)})"
        )


@analysis(
    title="Explorer", group="views", order=31, prompts=standard.explored, own_prompts=standard.longest,
    joint=True, in_all=False, automatic=True,
    needs=("heads",), inputs=lambda run: {"heads": HeadSet(tuple(run.leading))},
    run_settings={"max_map_bytes": MAX_REPORT_BYTES},
)  # fmt: skip
def explore(
    model: nn.Module,
    prompts: Prompts,
    *,
    heads: Any = None,
    maps: Any = "all",
    block: int | None = None,
    max_map_bytes: int | None = None,
    k: int = 4,
    title: str = "",
    marks: Sequence[str] = (),
    seed: int = 0,
) -> Explored:
    """Read the attention of every head on one prompt, as averages for each head (such as distance and entropy), maps of
    the attention between blocks of tokens, and the most attended keys of each query for chosen heads.

    `maps[i n m] = mean over q in block n of sum over k in block m of pattern[q k]`. The summaries `[l h]` are means
    over queries:

    - "first" is `pattern[q 0]` and "previous" is `pattern[q q-1]`, both for q >= 1.
    - "entropy" is the entropy of the row in nats.
    - "near" is the share of attention on the query's own block and the one before, from the maps.
    - "distance" is `sum over m of maps[n m] (n - m) block / sum over m of maps[n m]`, in tokens; it can be
      wrong by up to one block.

    The model runs once. Memory grows with the length of the prompt, see `cost`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: One prompt.
        heads: Heads whose top k keys of each query are kept. Anything that `HeadSet.parse` takes, such as
            `scores.top(12)`. By default the top keys of all heads are read, which takes more time and memory, and those
            of 12 heads are kept: the heads whose last 512 queries attend most to one key far back, by the mean of the
            squared weight of a top key that is not the first token and lies at least 16 tokens back.
        maps: Heads with a block map.
        block: Number of tokens in a block. By default the smallest of 1, 2, 3, 4, 6, 8, 12 ... that makes at most 96
            blocks.
        max_map_bytes: Largest size of the block maps of all heads in a page, at one byte a block. Where it is given and
            `block` is not, a block is the smallest power of two that keeps this limit.
        k: Number of top keys of a query.
        title: Heading, by default the question of the prompt where its `meta` has one.
        marks: Names of the spans to mark; by default all that cover at most half of the tokens.
        seed: Seed for the provenance; nothing is drawn.

    Returns:
        Explored: float32 `maps [i n n]` and `summaries [l h]`, `keys` and `probs [j q k]`.

    Raises:
        PromptError: For several prompts, or fewer than 2 tokens.
        HeadError: For heads that the model does not have.
        SpanError: For a mark that is no span of the prompt.
        UsageError: For a `block` or `k` that is no usable number.
        CostError: If the memory does not suffice, before anything is computed.

    Examples:
        >>> explored = interp.explore(model, prompts[:1], heads="L1H2", block=4)
        >>> explored.map("L1H2").shape
        torch.Size([5, 5])

    Source:
        This package.

    Limits:
        Does not show that a head matters; an ablation test shows that. Does not show what a head writes.
    """
    prompt, layout, size = _plan(model, prompts, block, max_map_bytes)
    if unknown := [name for name in marks if name not in prompt.spans]:
        known = ", ".join(prompt.spans) or "none"
        raise SpanError(f"the prompt has no span {unknown[0]!r} to mark; it has {known}.")
    mapped = HeadSet.parse(maps, layout)
    chosen = None if heads is None else HeadSet.parse(heads, layout)
    needed = cost(model, prompts, heads=chosen, block=size, k=k)
    if not needed.fits:
        size_and_free = str(needed).splitlines()[-1].split(maxsplit=2)[-1]
        raise CostError(
            f"exploring {len(prompt):,} tokens takes {size_and_free}; name the heads whose top keys are kept, or fewer."
        )
    first, before, tiles, best = mass(0), at(-1), blocks(size), top_keys(k)
    with ExitStack() as stack:
        wanted = [first, before, entropy(), tiles, *([best] if chosen is None else [])]
        every = stack.enter_context(capture(model, wanted, prompts))
        # the second capture computes no more than its own heads
        some = stack.enter_context(capture(model, best, prompts, heads=chosen)) if chosen else None
        run(model, prompts, logits_to_keep=1)
    if chosen is None:
        every_top = RankedKeys(*(part[0] for part in every[best]))
        chosen = _looking_back(every_top)
        top = RankedKeys(*(part[_index(chosen)] for part in every_top))
    elif some is not None:
        top = RankedKeys(*(part[0] for part in some[best]))
    else:
        top = RankedKeys(torch.zeros(0, len(prompt), k, dtype=torch.int64), torch.zeros(0, len(prompt), k))
    whole = every[tiles][0]
    summaries = {
        "first": every[first][0, :, :, 1:, 0].mean(-1),
        "previous": every[before][0, :, :, 1:, 0].mean(-1),
        **_from_maps(whole, len(prompt), size),
        "entropy": every[entropy()][0].mean(-1),
    }
    tokenizer = prompts.tokenizer
    return Explored(
        title=title or str(prompt.meta.get("question") or ""),
        tokens=tuple(tokenizer.decode([token]) if tokenizer is not None else str(token) for token in prompt.ids),
        layout=layout,
        summaries={name: table.float() for name, table in summaries.items()},
        block=size,
        mapped=mapped,
        maps=whole[_index(mapped)].float(),
        heads=chosen,
        keys=top.keys,
        probs=top.probs.float(),
        marks={name: ranges for name, ranges in prompt.spans.items() if name in (marks or _marked(prompt))},
        settings={"block": size, "k": k, "heads": "looking back" if heads is None else "given"},
        provenance=Provenance.of(model, tokenizer, seed=seed),
    )


def cost(model: nn.Module, prompts: Prompts, *, heads: Any = None, block: int | None = None, k: int = 4) -> CaptureCost:
    """Host memory that `explore` takes with these settings, in bytes for each kept reduction; the model does not run.

    It is twice the size of the reductions, since joining layers copies them.

    Args:
        model: As in `explore`.
        prompts: As in `explore`.
        heads: As in `explore`.
        block: As in `explore`.
        k: As in `explore`.

    Returns:
        CaptureCost: Its parts, and the memory that is free.

    Raises:
        PromptError: For several prompts, or fewer than 2 tokens.
        HeadError: For heads that the model does not have.
        UsageError: For a `block` that is no usable number.
    """
    prompt, layout, size = _plan(model, prompts, block)
    every = capture(model, [mass(0), at(-1), entropy(), blocks(size)], prompts).cost(1, len(prompt))
    best = top_keys(k)
    count = layout.size if heads is None else len(HeadSet.parse(heads, layout))
    part = (f"{best!r} of {count} heads", 8 * count * best.width(len(prompt), len(prompt)))
    return CaptureCost((*every.parts, part), every.free)


def _plan(
    model: nn.Module, prompts: Prompts, block: int | None, max_map_bytes: int | None = None
) -> tuple[Prompt, HeadLayout, int]:
    """The prompt, the layout of the model, and the number of tokens in a block."""
    if len(prompts) != 1:
        raise PromptError(f"{len(prompts)} prompts were given to explore; give one, such as prompts[:1].")
    prompt = prompts[0]
    if len(prompt) < 2:
        raise PromptError("a prompt of one token has nothing to explore; give at least two tokens.")
    if block is not None and (type(block) is not int or block < 1):
        raise UsageError(f"block={block!r} is no number of tokens; give a whole number of at least 1.")
    layout = HeadLayout.of(model)
    if block is None and max_map_bytes is not None:
        return prompt, layout, block_within(len(prompt), layout, max_map_bytes)
    return prompt, layout, _usual_block(len(prompt)) if block is None else block


def block_within(n_tokens: int, layout: HeadLayout, max_map_bytes: int) -> int:
    """The smallest power of two with which the block maps of all heads take at most so many bytes.

    A map is triangular and takes one byte for each block.
    """
    n_blocks = max(1.0, (2 * max_map_bytes / layout.size) ** 0.5)
    return 1 << max(0, math.ceil(math.log2(n_tokens / n_blocks)))


def _usual_block(n_tokens: int) -> int:
    """The smallest power of two, or three times one, that makes no more blocks than a map can show."""
    least = n_tokens / MAX_BLOCKS
    power = 1 << max(0, math.ceil(math.log2(least)))
    return power * 3 // 4 if power >= 4 and power * 3 / 4 >= least else power


def _marked(prompt: Prompt) -> list[str]:
    """The spans that cover at most half of the prompt; longer ones mark no place."""
    sizes = {name: sum(b - a for a, b in ranges) for name, ranges in prompt.spans.items()}
    return [name for name, size in sizes.items() if 2 * size <= len(prompt)]


def _looking_back(top: RankedKeys) -> HeadSet:
    """The heads whose last queries attend most to one key far back, by their top keys `[l h q k]`."""
    keys, probs = (part[..., -N_LAST_QUERIES:, 0] for part in top)
    n = top.keys.shape[2]
    back = torch.arange(n)[-N_LAST_QUERIES:] - keys
    score = torch.where((keys > 0) & (back >= MIN_DISTANCE), probs, 0.0).square().mean(-1)
    order = score.flatten().sort(descending=True, stable=True).indices[:N_CHOSEN].tolist()
    return HeadSet(tuple(Head(*divmod(i, score.shape[1])) for i in order))


def _index(heads: HeadSet) -> tuple[Tensor, Tensor]:
    """Indices that pick heads from a table `[l h ...]`."""
    layer, head = torch.tensor([*heads], dtype=torch.int64).view(-1, 2).T
    return layer, head


def _from_maps(maps: Float[Tensor, "l h n n"], length: int, size: int) -> dict[str, Float[Tensor, "l h"]]:
    """The summaries "near" and "distance"; every query has the same weight."""
    n = maps.shape[-1]
    queries = torch.full((n,), float(size))
    queries[-1] = length - size * (n - 1)
    share = maps * queries[:, None] / length
    apart = torch.arange(n)[:, None] - torch.arange(n)
    return {
        "near": share[..., (apart == 0) | (apart == 1)].sum(-1),
        "distance": (share * apart * size).sum((-1, -2)) / share.sum((-1, -2)).clamp(min=1e-12),
    }


def _place(head: Any, heads: HeadSet, what: str) -> int:
    found = Head.parse(head)
    if found not in heads:
        raise HeadError(f"{found} has no {what} here; choose from {heads!r}, or explore it with the others.")
    return heads.heads.index(found)
