"""What an attention call takes and returns, whichever engine serves it.

Axes: `b` batch, `h` query head, `g` kv head, `q` query, `k` key, `d` head dim, `s` key sets, `r` chosen queries.
Columns are absolute in the padded batch: query i stands at `q_start + i`, key j at `k_start + j`; a cache that dropped
its oldest keys has `k_start > 0`. Turning columns into positions of the unpadded prompt is the hooks' work.

Order of operations: scale, logit_scale, softcap, key_bias + row_coef, mask, softmax. Bias of -inf belongs to the mask,
bias of +inf counts as LARGEST, which takes the whole row.
Statistics are float32 (float64 where q is). A row that sees nothing has out 0, lse -inf, argmax -1, mass 0, never NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from interp.errors import UsageError

LARGEST = 1e30
"""a bias of +inf becomes this: inf - inf would be nan"""


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call as a model makes it, q and k after norm, RoPE and cache."""

    q: Tensor
    """[b h q d]"""
    k: Tensor
    """[b g k d]; kv heads are not repeated"""
    v: Tensor
    """[b g k d]"""
    scale: float
    q_start: int = 0
    """column of the first query"""
    k_start: int = 0
    """column of the first key"""
    causal: bool = True
    window: int | None = None
    """keys that a query sees, itself included; None for all"""
    softcap: float | None = None
    sinks: Tensor | None = None
    """[h] logit of a learned sink, part of every denominator"""
    live: Tensor | None = None
    """Bool [b k]: False for padding"""
    row_live: Tensor | None = None
    """Bool [b q]: False for a query that is padding"""
    mask: Tensor | None = None
    """[b 1|h q k], bool (True sees) or added to the logits; for masks that no field above can say"""
    key_bias: Tensor | None = None
    """Float [b|1 h k], added to the logits of every row"""
    row_coef: Tensor | None = None
    """Float [b|1 h q s]: with key_group, adds row_coef[b h q s] to the keys of group s + 1"""
    key_group: Tensor | None = None
    """Int [b|1 k], or [b|1 h k] where heads differ: 0 for no group, else 1 + index into the last axis of row_coef"""
    row_columns: Tensor | None = None
    """Int [q] column of each query, where they do not follow q_start one by one"""
    logit_scale: Tensor | None = None
    """Float [h] or [b h], times the scaled logits; 0 makes attention uniform over what a row sees"""

    def __post_init__(self) -> None:
        heads, groups = self.q.shape[1], self.k.shape[1]
        if heads % groups or self.q.shape[-1] != self.k.shape[-1] or self.k.shape[:3] != self.v.shape[:3]:
            raise UsageError(
                f"q {tuple(self.q.shape)}, k {tuple(self.k.shape)} and v {tuple(self.v.shape)} do not fit together: "
                "expected [b h q d], [b g k d] and [b g k e] with h a multiple of g."
            )

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """b, h, g, q, k"""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1], self.q.shape[2], self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that statistics are computed in."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def edited(self) -> bool:
        """Whether anything was added that the model's own attention function does not know."""
        return any(x is not None for x in (self.key_bias, self.row_coef, self.logit_scale))

    @property
    def add_key_bias(self) -> bool:
        """Whether anything is added to the logits."""
        added = self.mask is not None and self.mask.dtype != torch.bool
        return added or self.key_bias is not None or self.row_coef is not None

    @property
    def open(self) -> bool:
        """Whether every row may see every key, whatever is added to the logits, as in a plain decode step."""
        limits = self.window, self.live, self.row_live, self.mask, self.row_columns
        if any(x is not None for x in limits):
            return False
        return not self.causal or self.q_start >= self.k_start + self.k.shape[2] - 1

    @property
    def rows(self) -> Tensor:
        """Int [q]: the column of each query."""
        if self.row_columns is not None:
            return self.row_columns
        return torch.arange(self.q_start, self.q_start + self.q.shape[2], device=self.q.device)

    def visible(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """Bool [b|1 1|h q k]: which keys each query may attend to, for a range of query and key indices."""
        seen = self.sight(rows, keys)
        if self.key_bias is not None:
            seen = seen & (self.key_bias[:, :, None, keys] > -torch.inf)
        if self.row_coef is not None:
            seen = seen & (self.bias(rows, keys) > -torch.inf)
        return seen

    def sight(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """Bool [b|1 1|h q k]: the same, whatever biases take away."""
        row = self.rows[rows, None]
        column = torch.arange(self.k_start, self.k_start + self.k.shape[2], device=self.q.device)[keys]
        seen = torch.ones(1, 1, row.shape[0], column.shape[0], dtype=torch.bool, device=self.q.device)
        if self.causal:
            seen = seen & (column <= row)
        if self.window is not None:
            seen = seen & (column > row - self.window)
        if self.live is not None:
            seen = seen & self.live[:, None, None, keys]
        if self.row_live is not None:
            seen = seen & self.row_live[:, None, rows, None]
        if self.mask is not None:
            part = self.mask[:, :, rows, keys]
            seen = seen & (part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min)
        return seen

    def bias(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """Float [b|1 h q k]: key_bias + row_coef + an additive mask, for a range of query and key indices."""
        total = torch.zeros((), dtype=self.dtype, device=self.q.device)
        if self.key_bias is not None:
            total = total + self.key_bias[:, :, None, keys].to(self.dtype).clamp(max=LARGEST)
        if self.row_coef is not None:
            coef = self.row_coef[:, :, rows].to(self.dtype).clamp(max=LARGEST)
            group = self.group_of_key[:, :, None, keys]
            if coef.shape[-1] == 1:
                total = torch.where(group == 1, total + coef, total)
            else:
                coef = torch.nn.functional.pad(coef, (1, 0)).expand(self.q.shape[0], -1, -1, -1)
                heads = max(coef.shape[1], group.shape[1])
                group = group.to(torch.int64).expand(-1, heads, coef.shape[2], -1)
                total = total + coef.expand(-1, heads, -1, -1).gather(-1, group)
        if self.mask is not None and self.mask.dtype != torch.bool:
            total = total + self.mask[:, :, rows, keys].to(self.dtype).clamp(max=LARGEST)
        return total

    @property
    def group_of_key(self) -> Tensor:
        """Int [b 1|h k]: key_group for every prompt. Raises UsageError where row_coef lacks it."""
        if self.key_group is None:
            raise UsageError("row_coef was given without key_group: name the group of each key, 0 for none.")
        group = self.key_group if self.key_group.dim() == 3 else self.key_group[:, None]
        return group.expand(self.q.shape[0], -1, -1)

    def for_heads(self, heads: Tensor) -> "Call":
        """The same call for some query heads; the kv heads they share are taken along, one copy a head."""
        group = torch.div(heads, self.q.shape[1] // self.k.shape[1], rounding_mode="floor")

        def pick(x: Tensor | None, axis: int) -> Tensor | None:
            return x if x is None or x.shape[axis] == 1 else x.index_select(axis, heads)

        scale = self.logit_scale
        return replace(
            self,
            q=self.q.index_select(1, heads),
            k=self.k.index_select(1, group),
            v=self.v.index_select(1, group),
            sinks=None if self.sinks is None else self.sinks.index_select(0, heads),
            mask=pick(self.mask, 1),
            key_bias=pick(self.key_bias, 1),
            row_coef=pick(self.row_coef, 1),
            key_group=self.key_group if self.key_group is None or self.key_group.dim() < 3 else pick(self.key_group, 1),
            logit_scale=None if scale is None else scale.index_select(scale.dim() - 1, heads),
        )

    def for_queries(self, queries: Tensor) -> "Call":
        """The same call for some queries by index, [r]; the rows keep their columns."""
        return replace(
            self,
            row_columns=self.rows.index_select(0, queries),
            q=self.q.index_select(2, queries),
            row_live=None if self.row_live is None else self.row_live.index_select(1, queries),
            mask=None if self.mask is None else self.mask.index_select(2, queries),
            row_coef=None if self.row_coef is None else self.row_coef.index_select(2, queries),
        )


@dataclass(frozen=True, eq=False)
class Lse:
    """Natural log of a row's softmax denominator, learned sink included: [b h r], -inf where nothing is seen."""


@dataclass(frozen=True, eq=False)
class Entropy:
    """Entropy of a row in nats, of the distribution over keys alone where a learned sink takes a share: [b h r]."""


@dataclass(frozen=True, eq=False)
class TopKeys:
    """The k keys with the largest probability, ties to the lowest column: (columns [b h r k], -1 where there are
    fewer keys; probabilities [b h r k])."""

    k: int = 1


@dataclass(frozen=True, eq=False)
class Mass:
    """Share of attention on each of `s` key sets, which may overlap and be soft: [b h r s]."""

    sets: Tensor
    """Float [b s k] over the keys of the call"""
    by_value: bool = False
    """weigh each key by the norm of its value, p |v| / sum p |v|"""
    spans: bool = False
    """whether each set is a few ranges of keys, which makes its mass cheaper where an engine knows how"""


@dataclass(frozen=True, eq=False)
class At:
    """Attention at listed keys: [b h r n]; 0 where a listed column is not there or not seen."""

    keys: Tensor
    """Int [b r n] columns, -1 for none"""
    by_value: bool = False
    total: bool = False
    """sum over the list instead: [b h r]"""


@dataclass(frozen=True, eq=False)
class Columns:
    """What each key receives: (sum over q of w p, or the maximum) [b h k] and the weight of the rows that see it
    [b h k], so that a mean is their quotient. Rows that are padding never count."""

    stat: Literal["sum", "max"] = "sum"
    weights: Tensor | None = None
    """Float [b q] over the queries of the call; None for 1"""
    by_value: bool = False


@dataclass(frozen=True, eq=False)
class Rows:
    """Complete rows for chosen queries: [b h r k], probabilities, or logits with -inf where nothing is seen."""

    queries: Tensor
    """Int [r] indices of queries"""
    logits: bool = False


@dataclass(frozen=True, eq=False)
class Blocks:
    """Attention summed into blocks of `size` queries x `size` keys: (index of the first query block, sums
    [b h n m], live rows per query block [b n]). Blocks are counted from each prompt's first token."""

    size: int
    first: Tensor
    """Int [b] column of the first token of each prompt"""

    @cached_property
    def starts(self) -> list[int]:
        """`first` on the host, for which a device is waited once."""
        return self.first.tolist()


Request = Lse | Entropy | TopKeys | Mass | At | Columns | Rows | Blocks


@dataclass(frozen=True, eq=False)
class Result:
    """What came out: `out` [b h q d] in the dtype of v, or None when it was not wanted, and one value a request."""

    out: Tensor | None
    values: tuple[Any, ...]

    @property
    def written(self) -> Tensor:
        """`out`, for a caller that asked for it."""
        if self.out is None:
            raise UsageError("this output was not asked for: call the engine with out=True.")
        return self.out


Engine = Callable[..., Result]
"""engine(call, requests=(), queries=None, out=True): `queries` Int [r] limits Lse, Entropy, TopKeys, Mass, At, Columns
and Blocks to those rows; Rows names its own."""


def block_grid(call: Call, blocks: Blocks, queries: Tensor | None) -> tuple[int, int, int, Tensor, Tensor]:
    """First query block, how many query and key blocks, and the block of each query [b r] and key [b k]."""
    rows = call.rows if queries is None else call.rows.index_select(0, queries)
    first = blocks.first.to(rows.device)[:, None]
    keys = torch.arange(call.k_start, call.k_start + call.k.shape[2], device=rows.device)
    row_block = torch.div((rows[None] - first).clamp(min=0), blocks.size, rounding_mode="floor")
    key_block = torch.div((keys[None] - first).clamp(min=0), blocks.size, rounding_mode="floor")
    if not blocks.starts:
        return 0, 0, 0, row_block, key_block

    def last(column: int, start: int) -> int:
        return max(0, column - start) // blocks.size

    start, n_rows = 0, 0
    if len(rows):
        # rows that follow each other are known without asking the device
        follow = queries is None and call.row_columns is None
        low, high = (call.q_start, call.q_start + len(rows) - 1) if follow else map(int, rows.aminmax())
        start = last(low, max(blocks.starts))
        n_rows = last(high, min(blocks.starts)) - start + 1
    n_keys = last(call.k_start + len(keys) - 1, min(blocks.starts)) + 1 if len(keys) else 0
    return start, n_rows, n_keys, row_block - start, key_block
