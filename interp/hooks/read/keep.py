"""What to keep of attention: small frozen objects that print, hash, and say their cost before it is paid.

Positions count in the unpadded prompt; a keep binds itself to the columns of each attention call.
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


class Top(NamedTuple):
    """The keys with the largest probability: positions, -1 where there is none, and probabilities; [b l h q k] each."""

    keys: Tensor
    probs: Tensor


@dataclass(frozen=True)
class Keep:
    """Base of the keeps. `axes` names what follows batch, layer and head in the result."""

    axes: ClassVar[str] = "q"
    kind: ClassVar[Literal["rows", "keys", "full", "blocks", "stream"]] = "rows"

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        """This keep in the columns of one attention call."""
        raise NotImplementedError

    def width(self, q: int, k: int) -> int:
        """Numbers per batch row, layer and head, for q queries and k keys."""
        return q

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def where_of(spans: tuple[Any, ...]) -> tuple[TokenSpan, ...]:
    """Spans as a user writes them, in the one form that hashes. Raises SpanError."""
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


@dataclass(frozen=True)
class mass(Keep):
    """Share of attention on each span, Float [b l h q s]; spans may overlap.

    mass[b l h q s] = sum over k in span s of pattern[b l h q k]; by_value weighs each key by the norm of its value and
    divides by the sum. Spans are names of the prompts' spans, positions, or ranges of positions: mass("needle", 0).
    A learned sink takes part in the denominator and in no span. Raises SpanError for a span that no prompt has.
    """

    spans: tuple[TokenSpan, ...]
    by_value: bool

    axes: ClassVar[str] = "q s"

    def __init__(self, *spans: Any, by_value: bool = False) -> None:
        if not spans:
            raise UsageError("mass() was given no span: name at least one, as in mass('needle').")
        object.__setattr__(self, "spans", where_of(spans))
        object.__setattr__(self, "by_value", by_value)

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        columns = key_columns(site)
        position = columns[None] - site.first[:, None]
        width = int(columns[-1]) + 1 if len(columns) else 0
        masks = torch.stack([spans(where, width).to(columns.device) for where in self.spans], 1)
        inside = position >= 0
        sets = masks.gather(-1, position.clamp(min=0)[:, None].expand(-1, len(self.spans), -1)) & inside[:, None]
        return contract.Mass(sets, by_value=self.by_value, spans=True)

    def width(self, q: int, k: int) -> int:
        return q * len(self.spans)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.spans))
        return f"mass({shown}{', by_value=True' if self.by_value else ''})"


@dataclass(frozen=True)
class at(Keep):
    """Attention at chosen keys, Float [b l h q n]; 0 where the key is not there.

    at(-1) is pattern[b l h q q - 1]; several offsets give several numbers. at(keys=t) with t Int [b q n] lists
    positions for every query position, -1 for none. total=True sums over the list, Float [b l h q]. by_value as in
    `mass`.
    """

    offsets: tuple[int, ...]
    keys: Tensor | None = field(compare=False)
    by_value: bool
    total: bool
    identity: int | None = None

    axes: ClassVar[str] = "q n"

    def __init__(self, *offsets: int, keys: Tensor | None = None, by_value: bool = False, total: bool = False) -> None:
        if bool(offsets) == (keys is not None):
            raise UsageError("at() takes offsets, as in at(-1), or keys= of shape [b q n], and not both.")
        if keys is not None and keys.dim() != 3:
            raise UsageError(f"at(keys=) was given shape {tuple(keys.shape)}: expected [b q n].")
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "by_value", by_value)
        object.__setattr__(self, "total", total)
        object.__setattr__(self, "identity", None if keys is None else id(keys))

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        rows = site.call.rows if queries is None else site.call.rows[queries]
        if self.keys is None:
            offsets = torch.tensor(self.offsets, device=rows.device)
            columns = (rows[:, None] + offsets).expand(len(site.first), -1, -1)
            columns = columns.masked_fill(columns < site.first[:, None, None], -1)
        else:
            if self.keys.shape[0] != len(site.first):
                raise UsageError(f"at(keys=) lists {self.keys.shape[0]} rows of a batch of {len(site.first)}.")
            position = rows[None] - site.first[:, None]
            listed = self.keys.to(rows.device)
            there = (position >= 0) & (position < listed.shape[1])
            index = position.clamp(0, max(0, listed.shape[1] - 1))[..., None].expand(-1, -1, listed.shape[2])
            wanted = listed.gather(1, index)
            columns = wanted + site.first[:, None, None]
            columns = columns.masked_fill((wanted < 0) | ~there[..., None], -1)
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
class top_keys(Keep):
    """The k most attended keys of each query, ties to the earlier key.

    Top(keys Int64, probs Float), [b l h q k] each; -1 and 0 where fewer keys are seen.
    """

    k: int = 1

    axes: ClassVar[str] = "q k"

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 64:
            raise UsageError(f"top_keys({self.k}) is out of range: ask for 1 to 64 keys.")

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        return contract.TopKeys(self.k)

    def width(self, q: int, k: int) -> int:
        # a key is an int64, a probability a float32
        return 3 * q * self.k

    def __repr__(self) -> str:
        return f"top_keys({self.k})"


@dataclass(frozen=True, repr=False)
class entropy(Keep):
    """Entropy of each query's attention over keys in nats, Float [b l h q]; a learned sink's share is left out."""

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        return contract.Entropy()


@dataclass(frozen=True, repr=False)
class lse(Keep):
    """Natural log of each query's softmax denominator, Float [b l h q]."""

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        return contract.Lse()


@dataclass(frozen=True)
class columns(Keep):
    """What each key receives over the queries read, Float [b l h k].

    stat "sum": sum over q of w pattern; "mean": the same divided by the weight of the queries that see the key;
    "max": the largest w pattern. weights: Float [b q] over positions, 1 by default. by_value as in `mass`.
    """

    stat: Literal["mean", "sum", "max"] = "mean"
    weights: Tensor | None = field(default=None, compare=False)
    by_value: bool = False
    identity: int | None = field(default=None, init=False)

    axes: ClassVar[str] = "k"
    kind: ClassVar[Literal["rows", "keys", "full", "blocks", "stream"]] = "keys"

    def __post_init__(self) -> None:
        if self.stat not in ("mean", "sum", "max"):
            raise UsageError(f"columns({self.stat!r}) is no statistic: take 'mean', 'sum' or 'max'.")
        if self.weights is not None and self.weights.dim() != 2:
            raise UsageError(f"columns(weights=) was given shape {tuple(self.weights.shape)}: expected [b q].")
        object.__setattr__(self, "identity", None if self.weights is None else id(self.weights))

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        weights = None
        if self.weights is not None:
            position = site.call.rows[None] - site.first[:, None]
            given = self.weights.to(site.call.dtype).to(position.device)
            inside = (position >= 0) & (position < given.shape[1])
            weights = given.gather(1, position.clamp(0, given.shape[1] - 1)) * inside
        return contract.Columns("max" if self.stat == "max" else "sum", weights, self.by_value)

    def width(self, q: int, k: int) -> int:
        return 2 * k

    def __repr__(self) -> str:
        more = "" if self.weights is None else f", weights={list(self.weights.shape)}"
        return f"columns({self.stat!r}{more}{', by_value=True' if self.by_value else ''})"


@dataclass(frozen=True)
class rows(Keep):
    """Complete rows of the pattern for the queries read, Float [b l h q k]; logits=True: before the softmax, -inf where
    a query may not look. Give queries= to the capture, or it is n x n: see `pattern`."""

    logits: bool = False

    axes: ClassVar[str] = "q k"
    kind: ClassVar[Literal["rows", "keys", "full", "blocks", "stream"]] = "full"

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        index = torch.arange(site.call.q.shape[2], device=site.call.q.device) if queries is None else queries
        return contract.Rows(index, self.logits)

    def width(self, q: int, k: int) -> int:
        return q * k

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'logits=True' if self.logits else ''})"


@dataclass(frozen=True, repr=False)
class pattern(rows):
    """The whole pattern, Float [b l h q k], n x n: for short prompts; the cost check refuses what does not fit."""


@dataclass(frozen=True, repr=False)
class blocks(Keep):
    """Attention between blocks of `size` positions, Float [b l h n m]: mean over the queries of block n of their mass
    on block m, so that a row of blocks sums to one less a learned sink."""

    size: int = 64

    axes: ClassVar[str] = "n m"
    kind: ClassVar[Literal["rows", "keys", "full", "blocks", "stream"]] = "blocks"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"blocks({self.size}) is out of range: give at least 1 position a block.")

    def request(self, site: Site, queries: Tensor | None, spans: SpanMask) -> Request:
        return contract.Blocks(self.size, site.first)

    def width(self, q: int, k: int) -> int:
        return math.ceil(q / self.size) * math.ceil(k / self.size)

    def __repr__(self) -> str:
        return f"blocks({self.size})"


@dataclass(frozen=True, repr=False)
class z(Keep):
    """Each head's output at the input of the output projection, Float [b l h q d] in the model's dtype."""

    axes: ClassVar[str] = "q d"
    kind: ClassVar[Literal["rows", "keys", "full", "blocks", "stream"]] = "stream"

    def width(self, q: int, k: int) -> int:
        return q

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@dataclass(frozen=True, repr=False)
class q(z):
    """Queries after norm and RoPE, Float [b l h q d]."""


@dataclass(frozen=True, repr=False)
class k(z):
    """Keys after norm and RoPE, one per kv head, Float [b l g q d]."""


@dataclass(frozen=True, repr=False)
class v(z):
    """Values, one per kv head, Float [b l g q d]."""


def key_columns(site: Site) -> Tensor:
    """Int [k]: the column of each key of a call."""
    call = site.call
    return torch.arange(call.k_start, call.k_start + call.k.shape[2], device=call.q.device)
