"""The classes of the reductions that a capture can keep; `interp.keep` has the functions that make them.

A reduction is a small frozen object that prints, hashes and compares. Its positions count in the unpadded prompt; for
each attention call it is translated to the columns of that call.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from interp.errors import SpanError, UsageError
from interp.hooks.prompts.batch_spans import TokenSpan
from interp.hooks.seam import Site
from interp.kernels import contract
from interp.kernels.contract import Request

SpanMask = Callable[[TokenSpan, int], Tensor]
"""(where, width) -> Bool [b width] over positions"""
Kind = Literal["rows", "keys", "full", "blocks", "stream"]
"""How the chunks of a run are joined: along queries, along keys, along both, as blocks, or as q, k, v and z."""
MAX_TOP_KEYS = 64


class RankedKeys(NamedTuple):
    """The keys with the largest probabilities, `[b l h q k]`: `keys` are positions (-1 for none), `probs` is float."""

    keys: Tensor
    probs: Tensor


@dataclass(frozen=True)
class Keep:
    """Base class of the reductions that a capture can keep."""

    label: ClassVar[str] = "Keep"
    """The name of the function in `interp.keep` that makes it."""
    axes: ClassVar[str] = "q"
    """The axes of the result that follow batch, layer and head."""
    kind: ClassVar[Kind] = "rows"
    """How the chunks of a run are joined."""

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        """Translate the reduction to the columns of one attention call.

        Args:
            site: The attention call.
            queries: Int `[r]`, indices of the queries that are read; None for all.
            spans: Function that gives the positions of a span in each row of the batch.

        Returns:
            Request: The request to the kernels.
        """
        raise NotImplementedError

    def width(self, q: int, k: int) -> int:
        """Count the numbers held per batch row, layer and head, for q queries and k keys.

        Args:
            q: Number of queries.
            k: Number of keys.

        Returns:
            The count.
        """
        return q

    def __repr__(self) -> str:
        return f"{self.label}()"


def normalize_spans(spans: tuple[Any, ...]) -> tuple[TokenSpan, ...]:
    """Convert spans to their hashable form: names, positions, and ranges as pairs (start, stop).

    Args:
        spans: Names, positions, pairs (start, stop), or ranges and slices in steps of 1.

    Returns:
        tuple[TokenSpan, ...]: One entry per span.

    Raises:
        SpanError: If an entry is not a span, or a range is empty or negative.
    """
    made: list[TokenSpan] = []
    for span in spans:
        if isinstance(span, range) and span.step == 1:
            span = (span.start, span.stop)
        elif isinstance(span, slice) and span.step in (None, 1) and span.stop is not None:
            span = (span.start or 0, span.stop)
        if isinstance(span, bool) or not isinstance(span, str | int | tuple):
            raise SpanError(f"{span!r} is not a span: give a name, a position, or a range (start, stop).")
        if isinstance(span, tuple) and not (len(span) == 2 and all(type(end) is int for end in span)):
            raise SpanError(f"{span!r} is not a span: give a range as (start, stop), two whole numbers.")
        if (isinstance(span, int) and span < 0) or (isinstance(span, tuple) and not 0 <= span[0] < span[1]):
            raise SpanError(f"{span!r} is not a span: positions count from 0 and a range (start, stop) is not empty.")
        made.append(span)
    return tuple(made)


@dataclass(frozen=True, repr=False)
class Mass(Keep):
    """Share of attention on each span, Float `[b l h q s]`; made by `keep.mass`."""

    spans: tuple[TokenSpan, ...]
    by_value: bool = False

    label: ClassVar[str] = "mass"
    axes: ClassVar[str] = "q s"

    def __post_init__(self) -> None:
        if not self.spans:
            raise UsageError("mass() was given no span: name at least one, as in mass('needle').")
        object.__setattr__(self, "spans", normalize_spans(self.spans))

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        position = site.key_position
        width = site.call.k_start + position.shape[1]
        masks = torch.stack([spans(where, width).to(position.device) for where in self.spans], 1)
        inside = position >= 0
        sets = masks.gather(-1, position.clamp(min=0)[:, None].expand(-1, len(self.spans), -1)) & inside[:, None]
        return contract.Mass(sets, by_value=self.by_value, spans=True)

    def width(self, q: int, k: int) -> int:
        return q * len(self.spans)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.spans))
        return f"mass({shown}{', by_value=True' if self.by_value else ''})"


@dataclass(frozen=True, repr=False)
class At(Keep):
    """Attention at chosen keys, Float `[b l h q n]`; made by `keep.at`."""

    offsets: tuple[int, ...] = ()
    """Distances from the query, such as -1 for the key before it."""
    keys: Tensor | None = field(default=None, compare=False)
    """Positions `[b q n]`."""
    by_value: bool = False
    """Whether keys are weighted by the norm of their values."""
    total: bool = False
    """Whether the attention on all chosen keys is added up."""
    identity: int | None = field(default=None, init=False)
    """Identity of the tensor of keys, since two tensors are not compared by value."""

    label: ClassVar[str] = "at"
    axes: ClassVar[str] = "q n"

    def __post_init__(self) -> None:
        if bool(self.offsets) == (self.keys is not None):
            raise UsageError("at() needs either offsets, as in at(-1), or keys= of shape [b q n], and not both.")
        if self.keys is not None and self.keys.dim() != 3:
            raise UsageError(f"at(keys=) was given shape {tuple(self.keys.shape)}: expected [b q n].")
        object.__setattr__(self, "identity", None if self.keys is None else id(self.keys))

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        rows = site.call.rows if queries is None else site.call.rows[queries]
        position = site.text.at(rows)
        if self.keys is None:
            there = position >= 0
            wanted = position[..., None] + torch.tensor(self.offsets, device=rows.device)
        else:
            if self.keys.shape[0] != len(position):
                raise UsageError(
                    f"at(keys=) has {self.keys.shape[0]} rows for a batch of {len(position)}: give a row per prompt."
                )
            listed = self.keys.to(rows.device)
            there = (position >= 0) & (position < listed.shape[1])
            index = position.clamp(0, max(0, listed.shape[1] - 1))[..., None].expand(-1, -1, listed.shape[2])
            wanted = listed.gather(1, index)
        columns = site.text.columns(wanted).masked_fill(~there[..., None], -1)
        return contract.At(columns, by_value=self.by_value, total=self.total)

    def width(self, q: int, k: int) -> int:
        if self.total:
            return q
        return q * (len(self.offsets) if self.keys is None else self.keys.shape[2])

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.offsets)) if self.keys is None else f"keys={list(self.keys.shape)}"
        more = "".join(f", {name}=True" for name in ("by_value", "total") if getattr(self, name))
        return f"at({shown}{more})"


@dataclass(frozen=True, repr=False)
class TopKeys(Keep):
    """The k most attended keys of each query, `[b l h q k]`; made by `keep.top_keys`."""

    k: int = 1

    label: ClassVar[str] = "top_keys"
    axes: ClassVar[str] = "q k"

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_TOP_KEYS:
            raise UsageError(f"top_keys({self.k}) is out of range: give a number from 1 to {MAX_TOP_KEYS}.")

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        return contract.TopKeys(self.k)

    def width(self, q: int, k: int) -> int:
        # a key is an int64, a probability a float32
        return 3 * q * self.k

    def __repr__(self) -> str:
        return f"top_keys({self.k})"


@dataclass(frozen=True, repr=False)
class Entropy(Keep):
    """Entropy of each query's attention, Float `[b l h q]`; made by `keep.entropy`."""

    label: ClassVar[str] = "entropy"

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        return contract.Entropy()


@dataclass(frozen=True, repr=False)
class Lse(Keep):
    """Log-sum-exp of each query's logits, Float `[b l h q]`; made by `keep.lse`."""

    label: ClassVar[str] = "lse"

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        return contract.Lse()


@dataclass(frozen=True, repr=False)
class Columns(Keep):
    """Attention that each key receives, Float `[b l h k]`; made by `keep.columns`."""

    stat: Literal["mean", "sum", "max"] = "mean"
    """Statistic over the queries."""
    weights: Tensor | None = field(default=None, compare=False)
    """Weights of the queries, `[b q]`."""
    by_value: bool = False
    """Whether keys are weighted by the norm of their values."""
    identity: int | None = field(default=None, init=False)
    """Identity of the tensor of weights, since two tensors are not compared by value."""

    label: ClassVar[str] = "columns"
    axes: ClassVar[str] = "k"
    kind: ClassVar[Kind] = "keys"

    def __post_init__(self) -> None:
        if self.stat not in ("mean", "sum", "max"):
            raise UsageError(f"unknown statistic {self.stat!r} of columns(); choose from 'mean', 'sum', 'max'.")
        if self.weights is not None and self.weights.dim() != 2:
            raise UsageError(f"columns(weights=) was given shape {tuple(self.weights.shape)}: expected [b q].")
        object.__setattr__(self, "identity", None if self.weights is None else id(self.weights))

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        weights = None
        if self.weights is not None:
            position = site.row_position
            given = self.weights.to(site.call.dtype).to(position.device)
            inside = (position >= 0) & (position < given.shape[1])
            weights = given.gather(1, position.clamp(0, given.shape[1] - 1)) * inside
        return contract.Columns("max" if self.stat == "max" else "sum", weights, self.by_value)

    def width(self, q: int, k: int) -> int:
        return 2 * k

    def __repr__(self) -> str:
        more = "" if self.weights is None else f", weights={list(self.weights.shape)}"
        return f"columns({self.stat!r}{more}{', by_value=True' if self.by_value else ''})"


@dataclass(frozen=True, repr=False)
class Rows(Keep):
    """Whole rows of the pattern, Float `[b l h q k]`; made by `keep.rows`."""

    logits: bool = False

    label: ClassVar[str] = "rows"
    axes: ClassVar[str] = "q k"
    kind: ClassVar[Kind] = "full"

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        index = torch.arange(site.call.q.shape[2], device=site.call.q.device) if queries is None else queries
        return contract.Rows(index, self.logits)

    def width(self, q: int, k: int) -> int:
        return q * k

    def __repr__(self) -> str:
        return f"{self.label}({'logits=True' if self.logits else ''})"


@dataclass(frozen=True, repr=False)
class Pattern(Rows):
    """The whole pattern, Float `[b l h q k]`; made by `keep.pattern`."""

    label: ClassVar[str] = "pattern"


@dataclass(frozen=True, repr=False)
class Blocks(Keep):
    """Attention between blocks of positions, Float `[b l h n m]`; made by `keep.blocks`."""

    size: int = 64

    label: ClassVar[str] = "blocks"
    axes: ClassVar[str] = "n m"
    kind: ClassVar[Kind] = "blocks"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"blocks({self.size}) is out of range: give at least 1 position per block.")

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        return contract.Blocks(self.size, site.first)

    def width(self, q: int, k: int) -> int:
        return math.ceil(q / self.size) * math.ceil(k / self.size)

    def __repr__(self) -> str:
        return f"blocks({self.size})"


@dataclass(frozen=True, repr=False)
class Stream(Keep):
    """Base class of vectors per head and position, read from the model itself and not from the kernels."""

    axes: ClassVar[str] = "q d"
    kind: ClassVar[Kind] = "stream"


@dataclass(frozen=True, repr=False)
class Z(Stream):
    """Output of each head, Float `[b l h q d]`; made by `keep.z`."""

    label: ClassVar[str] = "z"


@dataclass(frozen=True, repr=False)
class Q(Stream):
    """Queries after norm and RoPE, Float `[b l h q d]`; made by `keep.q`."""

    label: ClassVar[str] = "q"


@dataclass(frozen=True, repr=False)
class K(Stream):
    """Keys after norm and RoPE, Float `[b l g q d]`; made by `keep.k`."""

    label: ClassVar[str] = "k"


@dataclass(frozen=True, repr=False)
class V(Stream):
    """Values, Float `[b l g q d]`; made by `keep.v`."""

    label: ClassVar[str] = "v"
