"""Inputs and results of an attention call, the same for every engine.

Axes: `b` batch, `h` query head, `g` kv head, `q` query, `k` key, `d` head dim, `s` key sets, `r` chosen queries.
Columns are absolute in the padded batch: query i has column `q_start + i` and key j has column `k_start + j`. A cache
that dropped its oldest keys has `k_start > 0`. The hooks turn columns into positions of the unpadded prompt.

The operations are applied in this order: scale, logit_scale, softcap, key_bias + row_coef, mask, softmax. A bias of
-inf hides a key, like the mask. A bias of +inf is replaced by MAX_BIAS, which takes all the attention of a row.
Statistics are float32, or float64 if q is float64. A row that sees no key has out 0, lse -inf, argmax -1 and mass 0; it
is never NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from interp.errors import UsageError

MAX_BIAS = 1e30
"""Value that replaces a bias of +inf, because inf - inf would be NaN."""


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of a model, with q and k after norm, RoPE and cache."""

    q: Tensor
    """[b h q d]."""
    k: Tensor
    """[b g k d]; kv heads are not repeated."""
    v: Tensor
    """[b g k d]"""
    scale: float
    """Factor of the product of q and k."""
    q_start: int = 0
    """Column of the first query."""
    k_start: int = 0
    """Column of the first key."""
    causal: bool = True
    window: int | None = None
    """Number of keys that a query sees, its own key included; None for all."""
    softcap: float | None = None
    sinks: Tensor | None = None
    """[h] logit of a learned sink, which is part of every denominator."""
    live: Tensor | None = None
    """Bool [b k]: False for padding."""
    row_live: Tensor | None = None
    """Bool [b q]: False for a query that is padding."""
    mask: Tensor | None = None
    """[b 1|h q k], bool (True where the key is visible) or added to the logits; for masks that no field above can
    express."""
    key_bias: Tensor | None = None
    """Float [b|1 h k], added to the logits of every row."""
    row_coef: Tensor | None = None
    """Float [b|1 h q s]: together with key_group, adds row_coef[b h q s] to the keys of group s + 1."""
    key_group: Tensor | None = None
    """Int [b|1 k], or [b|1 h k] if heads differ: 0 for no group, else 1 + index into the last axis of row_coef."""
    row_columns: Tensor | None = None
    """Int [q] column of each query, if they do not follow q_start one by one."""
    logit_scale: Tensor | None = None
    """Float [h] or [b h], a factor of the scaled logits; 0 makes attention uniform over the visible keys."""

    def __post_init__(self) -> None:
        heads, groups = self.q.shape[1], self.k.shape[1]
        if heads % groups or self.q.shape[-1] != self.k.shape[-1] or self.k.shape[:3] != self.v.shape[:3]:
            raise UsageError(
                f"q {tuple(self.q.shape)}, k {tuple(self.k.shape)} and v {tuple(self.v.shape)} do not fit together; "
                "pass [b h q d], [b g k d] and [b g k e] with h a multiple of g."
            )

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Sizes of the axes b, h, g, q and k."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1], self.q.shape[2], self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the statistics."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def edited(self) -> bool:
        """Whether the call has an edit that the model's own attention function does not support."""
        return any(x is not None for x in (self.key_bias, self.row_coef, self.logit_scale))

    @property
    def adds_bias(self) -> bool:
        """Whether a bias or an additive mask is added to the logits."""
        added = self.mask is not None and self.mask.dtype != torch.bool
        return added or self.key_bias is not None or self.row_coef is not None

    @property
    def sees_all_keys(self) -> bool:
        """Whether every row sees every key when biases are ignored, as in a plain decode step."""
        limits = self.window, self.live, self.row_live, self.mask, self.row_columns
        if any(x is not None for x in limits):
            return False
        return not self.causal or self.q_start >= self.k_start + self.k.shape[2] - 1

    @property
    def rows(self) -> Tensor:
        """Int [q], the column of each query."""
        if self.row_columns is not None:
            return self.row_columns
        return torch.arange(self.q_start, self.q_start + self.q.shape[2], device=self.q.device)

    def visible(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """Return which keys each query may attend to.

        Args:
            rows: Range of query indices.
            keys: Range of key indices.

        Returns:
            Tensor: Bool [b|1 1|h q k].
        """
        seen = self.visible_ignoring_biases(rows, keys)
        if self.key_bias is not None:
            seen = seen & (self.key_bias[:, :, None, keys] > -torch.inf)
        if self.row_coef is not None:
            seen = seen & (self.bias(rows, keys) > -torch.inf)
        return seen

    def visible_ignoring_biases(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """Return which keys each query may attend to when the keys that biases hide count as visible.

        Args:
            rows: Range of query indices.
            keys: Range of key indices.

        Returns:
            Tensor: Bool [b|1 1|h q k].
        """
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
        """Return key_bias + row_coef + the additive mask.

        Args:
            rows: Range of query indices.
            keys: Range of key indices.

        Returns:
            Tensor: Float [b|1 h q k].

        Raises:
            UsageError: If row_coef is given without key_group.
        """
        total = torch.zeros((), dtype=self.dtype, device=self.q.device)
        if self.key_bias is not None:
            total = total + self.key_bias[:, :, None, keys].to(self.dtype).clamp(max=MAX_BIAS)
        if self.row_coef is not None:
            coef = self.row_coef[:, :, rows].to(self.dtype).clamp(max=MAX_BIAS)
            group = self.group_of_key[:, :, None, keys]
            if coef.shape[-1] == 1:
                total = torch.where(group == 1, total + coef, total)
            else:
                coef = torch.nn.functional.pad(coef, (1, 0)).expand(self.q.shape[0], -1, -1, -1)
                heads = max(coef.shape[1], group.shape[1])
                group = group.to(torch.int64).expand(-1, heads, coef.shape[2], -1)
                total = total + coef.expand(-1, heads, -1, -1).gather(-1, group)
        if self.mask is not None and self.mask.dtype != torch.bool:
            total = total + self.mask[:, :, rows, keys].to(self.dtype).clamp(max=MAX_BIAS)
        return total

    @property
    def group_of_key(self) -> Tensor:
        """Int [b 1|h k], key_group for every prompt.

        Raises:
            UsageError: If the call has no key_group.
        """
        if self.key_group is None:
            raise UsageError("row_coef was given without key_group; pass the group of each key, with 0 for no group.")
        group = self.key_group if self.key_group.dim() == 3 else self.key_group[:, None]
        return group.expand(self.q.shape[0], -1, -1)

    def for_heads(self, heads: Tensor) -> "Call":
        """Return the same call for some query heads.

        Args:
            heads: Int, indices of the query heads. Each head gets its own copy of its kv head.

        Returns:
            Call: The call with as many kv heads as query heads.
        """
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
        """Return the same call for some queries.

        Args:
            queries: Int [r], indices of the queries. The rows keep their columns.

        Returns:
            Call: The call with r queries.
        """
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
    """Natural log of the softmax denominator of each row, learned sink included: [b h r], -inf if no key is visible."""


@dataclass(frozen=True, eq=False)
class Entropy:
    """Entropy of each row in nats: [b h r]. The share of a learned sink is left out: the distribution is over keys."""


@dataclass(frozen=True, eq=False)
class TopKeys:
    """The k keys with the largest probability, with ties resolved to the lowest column.

    The value is (columns [b h r k], probabilities [b h r k]). The column is -1 if there are fewer keys.
    """

    k: int = 1
    """Number of keys."""


@dataclass(frozen=True, eq=False)
class Mass:
    """Share of attention on each of `s` key sets: [b h r s]. Sets may overlap, and membership may be fractional."""

    sets: Tensor
    """Float [b s k], membership of the keys of the call, or [b h s k] if heads differ."""
    by_value: bool = False
    """Weight each key by the norm of its value: p |v| / sum p |v|."""
    spans: bool = False
    """Whether each set consists of a few ranges of keys. Some engines compute such masses at a lower cost."""


@dataclass(frozen=True, eq=False)
class At:
    """Attention at listed keys: [b h r n], 0 if a listed column does not exist or is not visible."""

    keys: Tensor
    """Int [b r n] columns, -1 for none."""
    by_value: bool = False
    """Weight each key by the norm of its value: p |v| / sum p |v|."""
    total: bool = False
    """Return the sum over the list instead: [b h r]."""


@dataclass(frozen=True, eq=False)
class Columns:
    """Attention that each key receives, as a sum or maximum over queries.

    The value is (sum over q of w p, or the maximum, [b h k]; total weight of the rows that see the key [b h k]). The
    quotient of the two is the mean. Rows that are padding never count.
    """

    stat: Literal["sum", "max"] = "sum"
    """Reduction over the queries."""
    weights: Tensor | None = None
    """Float [b q], weights of the queries of the call; None for 1."""
    by_value: bool = False
    """Weight each key by the norm of its value: p |v| / sum p |v|."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Complete rows of chosen queries: [b h r k], as probabilities or logits."""

    queries: Tensor
    """Int [r], indices of the queries."""
    logits: bool = False
    """Return logits instead of probabilities, with -inf for keys that are not visible."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Attention summed over blocks of `size` queries x `size` keys, counted from the first token of each prompt.

    The value is (index of the first query block, sums [b h n m], live rows of each query block [b n]).
    """

    size: int
    """Number of queries and of keys of a block."""
    first: Tensor
    """Int [b], column of the first token of each prompt."""

    @cached_property
    def starts(self) -> list[int]:
        """`first` as Python integers. The first access waits for the device."""
        return self.first.tolist()


Request = Lse | Entropy | TopKeys | Mass | At | Columns | Rows | Blocks
"""A reduction that an engine computes together with attention."""


@dataclass(frozen=True, eq=False)
class Result:
    """Output of an attention call and the value of each request."""

    out: Tensor | None
    """[b h q d] in the dtype of v; None if the call was made with `out=False`."""
    values: tuple[Any, ...]
    """One value per request, in the order of the requests."""

    @property
    def written(self) -> Tensor:
        """The output [b h q d].

        Raises:
            UsageError: If the call was made with `out=False`.
        """
        if self.out is None:
            raise UsageError("this result has no attention output; call the engine with out=True.")
        return self.out


Engine = Callable[..., Result]
"""engine(call, requests=(), queries=None, out=True). `queries`, Int [r], limits Lse, Entropy, TopKeys, Mass, At,
Columns and Blocks to those rows. A Rows request has its own queries."""


def block_grid(call: Call, blocks: Blocks, queries: Tensor | None) -> tuple[int, int, int, Tensor, Tensor]:
    """Place the rows and keys of a call on the grid of blocks.

    Args:
        call: The attention call.
        blocks: The request, with the block size and the first token of each prompt.
        queries: Int [r], indices of the queries that are read; None for all.

    Returns:
        tuple: Index of the first query block, number of query blocks, number of key blocks, block of each query [b r]
            relative to the first, and block of each key [b k].
    """
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
        # the columns of consecutive rows are known without waiting for the device
        follow = queries is None and call.row_columns is None
        low, high = (call.q_start, call.q_start + len(rows) - 1) if follow else map(int, rows.aminmax())
        start = last(low, max(blocks.starts))
        n_rows = last(high, min(blocks.starts)) - start + 1
    n_keys = last(call.k_start + len(keys) - 1, min(blocks.starts)) + 1 if len(keys) else 0
    return start, n_rows, n_keys, row_block - start, key_block
