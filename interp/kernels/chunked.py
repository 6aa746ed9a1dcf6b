"""Attention with reductions in O(n * block) memory, plain torch, any device: a block of rows at a time, all its keys.

A block's rows are complete, so every reduction comes out of the one pass over q k^T, columns included.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from interp.kernels.contract import (
    At,
    Blocks,
    Call,
    Columns,
    Entropy,
    Lse,
    Mass,
    Request,
    Result,
    Rows,
    TopKeys,
    block_grid,
)

BLOCK_ELEMENTS = 1 << 20
"""scores held at once; 4 MiB in float32 stays in cache on the machines we know (benchmarks/blocks.py)"""
TILE = 64
"""keys compared at once for the argmax: the maximum is found by tile, the key inside the winning tile"""


@dataclass(eq=False)
class Block:
    """Rows lo..hi of the pattern as the reductions see them, over keys `keys` only."""

    call: Call
    rows: slice
    """indices of the rows among the queries that are read"""
    keys: slice
    weight: Tensor
    """[b h r k] exp(logit - max): unnormalised, 0 where nothing is seen"""
    shifted: Tensor
    """[b h r k] logit - max, a large negative number where nothing is seen"""
    peak: Tensor
    """[b h r 1] max"""
    total: Tensor
    """[b h r 1] sum of weight over keys, without a learned sink; 1 on dead rows"""
    denominator: Tensor
    """[b h r 1] the same with the learned sink"""
    dead: Tensor
    """Bool [b h r] rows that see nothing"""
    value_norm: Tensor | None = None
    """[b h 1 k]"""
    _valued: Tensor | None = field(default=None, repr=False)

    def pattern(self, by_value: bool = False) -> tuple[Tensor, Tensor]:
        """Unnormalised weights [b h r k] and what to divide them by [b h r 1]."""
        if not by_value:
            return self.weight, self.denominator
        if self._valued is None:
            self._valued = self.weight * self.value_norm
        total = self._valued.sum(-1, keepdim=True)
        return self._valued, total.clamp(min=torch.finfo(total.dtype).tiny)


def attend(
    call: Call,
    requests: tuple[Request, ...] = (),
    queries: Tensor | None = None,
    out: bool = True,
    block: int = BLOCK_ELEMENTS,
) -> Result:
    """Attention and its reductions, one block of rows after the other.

    Equal to `naive.attend` up to rounding: out[b h q d] = sum over k of softmax(logits) v, statistics in float32
    (float64 where q is). Memory: a few times `block` scores, the outputs, and float32 copies of k and v.
    Where gradients are wanted they flow into `out`; the reductions carry none.
    """
    if out and queries is not None:
        # some rows are read, all are computed: the reductions run over their own rows
        plain = attend(call, block=block)
        return Result(plain.out, attend(call, requests, queries, out=False, block=block).values)
    chosen = tuple(i for i, request in enumerate(requests) if isinstance(request, Rows))
    values: list[Any] = [None] * len(requests)
    for i in chosen:
        values[i] = _full_rows(call, requests[i], block)
    rest = tuple(request for i, request in enumerate(requests) if i not in chosen)
    if queries is not None:
        call = call.for_queries(queries)
    if rest or out:
        result, found = _sweep(call, rest, queries, out, block)
        for i, value in zip((i for i in range(len(requests)) if i not in chosen), found, strict=True):
            values[i] = value
        return Result(result, tuple(values))
    return Result(None, tuple(values))


def _sweep(
    call: Call, requests: tuple[Request, ...], queries: Tensor | None, out: bool, size: int
) -> tuple[Tensor | None, list[Any]]:
    b, h, g = call.sizes[:3]
    steps = [_accumulator(request, call, queries) for request in requests]
    scorer = Scorer.of(call, requests)
    outs = []
    for rows in scorer.blocks(size):
        with torch.set_grad_enabled(torch.is_grad_enabled() and out):
            block = scorer.block(rows)
            if out:
                z = block.weight.view(b, g, -1, block.weight.shape[-1]) @ scorer.v[:, :, block.keys]
                z = z.view(b, h, rows.stop - rows.start, -1) / block.denominator
                outs.append(z.to(call.v.dtype))
        with torch.no_grad():
            for add, _ in steps:
                add(block)
    empty = call.v.new_zeros(b, h, 0, call.v.shape[-1])
    return (torch.cat(outs, 2) if outs else empty) if out else None, [value() for _, value in steps]


@dataclass(eq=False)
class Scorer:
    """Makes the blocks of one call: logits, softmax, and which keys a block of rows can see at all."""

    call: Call
    q: Tensor
    k: Tensor
    v: Tensor
    value_norm: Tensor | None
    dead_keys: slice
    """the narrowest range that holds every padded key"""

    @classmethod
    def of(cls, call: Call, requests: tuple[Request, ...]) -> "Scorer":
        b, h, g = call.sizes[:3]
        q = call.q.to(call.dtype) * call.scale
        if call.logit_scale is not None:
            q = q * call.logit_scale.to(call.dtype).expand(b, h)[:, :, None, None]
        v = call.v.to(call.dtype)
        norm = None
        if any(getattr(request, "by_value", False) for request in requests):
            norm = v.norm(dim=-1).repeat_interleave(h // g, 1)[:, :, None]
        dead = slice(0, 0)
        if call.live is not None:
            padded = (~call.live).any(0).nonzero()
            dead = slice(int(padded[0]), int(padded[-1]) + 1) if len(padded) else dead
        return cls(call, q, call.k.to(call.dtype), v, norm, dead)

    def blocks(self, size: int) -> list[slice]:
        b, h, _, n, n_keys = self.call.sizes
        step = max(1, min(n, size // max(1, b * h * n_keys)))
        return [slice(start, min(n, start + step)) for start in range(0, n, step)]

    def reach(self, rows: slice) -> slice:
        """The range of keys that some row of the block may see."""
        call, n_keys = self.call, self.k.shape[2]
        columns = call.rows[rows] - call.k_start
        low, high = 0, n_keys
        if call.causal:
            high = min(n_keys, int(columns.max()) + 1)
        if call.window is not None:
            low = max(0, int(columns.min()) - call.window + 1)
        return slice(min(low, n_keys), max(high, min(low, n_keys)))

    def logits(self, rows: slice, keys: slice, hidden: float) -> Tensor:
        """[b h r k] logits with `hidden` wherever a row may not look."""
        call = self.call
        b, h, g = call.sizes[:3]
        n, m = rows.stop - rows.start, keys.stop - keys.start
        q = self.q[:, :, rows].reshape(b, g, h // g * n, -1)
        score = (q @ self.k[:, :, keys].transpose(-1, -2)).view(b, h, n, m)
        if call.softcap is not None:
            score = torch.tanh(score / call.softcap) * call.softcap
        if call.key_bias is not None or call.row_coef is not None or call.mask is not None:
            score = score + call.bias(rows, keys)
            return score.masked_fill(~call.visible(rows, keys), hidden)
        for part in self.edges(rows, keys):
            local = slice(part.start - keys.start, part.stop - keys.start)
            seen = call.visible(rows, part)
            if score.requires_grad:
                cover = torch.ones(*seen.shape[:2], n, m, dtype=torch.bool, device=score.device)
                cover[..., local] = seen
                score = score.masked_fill(~cover, hidden)
            else:
                score[..., local].masked_fill_(~seen, hidden)
        if call.row_live is not None:
            score = score.masked_fill(~call.row_live[:, None, rows, None], hidden)
        return score

    def edges(self, rows: slice, keys: slice) -> list[slice]:
        """The ranges of keys where some row of the block sees and another does not; all else is seen by all."""
        call = self.call
        columns = call.rows[rows] - call.k_start
        first, last = int(columns.min()), int(columns.max())
        parts = [self.dead_keys]
        if call.causal:
            parts.append(slice(first + 1, last + 1))
        if call.window is not None:
            parts.append(slice(first - call.window + 1, last - call.window + 1))
        clipped = (slice(max(p.start, keys.start), min(p.stop, keys.stop)) for p in parts)
        return [p for p in clipped if p.stop > p.start]

    def block(self, rows: slice) -> Block:
        call, keys = self.call, self.reach(rows)
        b, h = call.sizes[:2]
        # a large finite number: 0 * -inf would turn entropy into nan
        hidden = torch.finfo(call.dtype).min / 4
        shape = (b, h, rows.stop - rows.start, 1)
        if keys.stop == keys.start:
            none = call.q.new_zeros(*shape[:3], 0, dtype=call.dtype)
            one = torch.ones(shape, dtype=call.dtype, device=call.q.device)
            return Block(call, rows, keys, none, none, one * hidden, one, one, one[..., 0] > 0)
        score = self.logits(rows, keys, hidden)
        peak = score.detach().amax(-1, keepdim=True)
        dead = peak[..., 0] <= hidden / 2
        sink = None
        if call.sinks is not None:
            sink = call.sinks.to(call.dtype)[None, :, None, None]
            peak = torch.maximum(peak, sink.detach().expand(shape))
        shifted = score - peak if score.requires_grad else score.sub_(peak)
        weight = torch.exp(shifted)
        if bool(dead.any()):
            weight = weight.masked_fill(dead[..., None], 0.0)
        total = weight.sum(-1, keepdim=True)
        denominator = total if sink is None else total + torch.exp(sink - peak)
        denominator = denominator.masked_fill(dead[..., None], 1.0)
        norm = None if self.value_norm is None else self.value_norm[..., keys]
        return Block(call, rows, keys, weight, shifted, peak, total, denominator, dead, norm)


def _full_rows(call: Call, request: Rows, size: int) -> Tensor:
    """[b h r k] probabilities or logits of the rows that a Rows request names."""
    with torch.no_grad():
        picked = call.for_queries(request.queries)
        scorer = Scorer.of(picked, ())
        b, h, _, n, n_keys = picked.sizes
        fill = -torch.inf if request.logits else 0.0
        full = torch.full((b, h, n, n_keys), fill, dtype=call.dtype, device=call.q.device)
        for rows in scorer.blocks(size):
            if request.logits:
                keys = scorer.reach(rows)
                full[:, :, rows, keys] = scorer.logits(rows, keys, -torch.inf)
            else:
                block = scorer.block(rows)
                full[:, :, rows, block.keys] = block.weight / block.denominator
        return full


Step = tuple[Callable[[Block], None], Callable[[], Any]]


def _by_rows(reduce: Callable[[Block], Tensor | tuple[Tensor, ...]], empty: Callable[[], Any]) -> Step:
    """A reduction whose value is one entry a row: blocks are put one after the other."""
    parts: list[Any] = []

    def value() -> Any:
        if not parts:
            return empty()
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(part, 2) for part in zip(*parts, strict=True))
        return torch.cat(parts, 2)

    return lambda block: parts.append(reduce(block)), value


@singledispatch
def _accumulator(request: Request, call: Call, queries: Tensor | None) -> Step:
    raise NotImplementedError(type(request).__name__)


def _zeros(call: Call, *rest: int) -> Callable[[], Tensor]:
    return lambda: call.q.new_zeros(*call.sizes[:2], 0, *rest, dtype=call.dtype)


@_accumulator.register
def _(request: Lse, call: Call, queries: Tensor | None) -> Step:
    def reduce(block: Block) -> Tensor:
        lse = (block.peak + block.denominator.log())[..., 0]
        return lse.masked_fill(block.dead, -torch.inf)

    return _by_rows(reduce, _zeros(call))


@_accumulator.register
def _(request: Entropy, call: Call, queries: Tensor | None) -> Step:
    def reduce(block: Block) -> Tensor:
        # log l - E[s - max], which stays exact at large logits where lse - E[s] does not
        total = block.total[..., 0].masked_fill(block.dead, 1.0)
        return total.log() - (block.weight * block.shifted).sum(-1) / total

    return _by_rows(reduce, _zeros(call))


@_accumulator.register
def _(request: TopKeys, call: Call, queries: Tensor | None) -> Step:
    def reduce(block: Block) -> tuple[Tensor, Tensor]:
        have = min(request.k, block.weight.shape[-1])
        best = _first_max(block.shifted) if request.k == 1 and have else _stable_top(block.shifted, have)
        probs = block.weight.gather(-1, best) / block.denominator
        found = block.shifted.gather(-1, best) > torch.finfo(call.dtype).min / 8
        keys = torch.where(found & ~block.dead[..., None], best + (call.k_start + block.keys.start), -1)
        pad = (0, request.k - have)
        return torch.nn.functional.pad(keys, pad, value=-1), torch.nn.functional.pad(probs * found, pad)

    return _by_rows(reduce, lambda: (_zeros(call, request.k)().long(), _zeros(call, request.k)()))


def _first_max(x: Tensor) -> Tensor:
    """[... 1] index of the maximum of the last axis, the lowest where several are equal."""
    n = x.shape[-1]
    whole = n - n % TILE
    if not whole:
        return _first(x == x.amax(-1, keepdim=True))
    tiles = x[..., :whole].unflatten(-1, (-1, TILE))
    peaks = tiles.amax(-1)
    tail = x[..., whole:].amax(-1, keepdim=True) if n > whole else None
    if tail is not None:
        peaks = torch.cat([peaks, tail], -1)
    top = peaks.amax(-1, keepdim=True)
    tile = _first(peaks == top)
    start = (tile * TILE).clamp(max=n - TILE)
    inside = start + torch.arange(TILE, device=x.device)
    # the last tile may reach back into its neighbour, which holds no value as large, or the neighbour had won
    return start + _first(x.gather(-1, inside) == top)


def _first(hit: Tensor) -> Tensor:
    """[... 1] index of the first True; argmax does not promise the first one everywhere."""
    place = torch.arange(hit.shape[-1], device=hit.device)
    return torch.where(hit, place, hit.shape[-1] - 1).amin(-1, keepdim=True)


def _stable_top(x: Tensor, k: int) -> Tensor:
    """[... k] indices of the k largest, ties to the lowest index."""
    if k == 0:
        return x.new_zeros(*x.shape[:-1], 0, dtype=torch.int64)
    values, index = x.topk(k, -1)
    # topk may name any of several equal keys at its cut: where the cut is tied, sort the row
    tied = (x == values[..., -1:]).sum(-1) > (values == values[..., -1:]).sum(-1)
    tied |= (values[..., 1:] == values[..., :-1]).any(-1)
    if bool(tied.any()):
        index[tied] = x[tied].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return index


@_accumulator.register
def _(request: Mass, call: Call, queries: Tensor | None) -> Step:
    sets = request.sets.to(call.dtype).transpose(-1, -2)
    b, h = call.sizes[:2]

    def reduce(block: Block) -> Tensor:
        weight, total = block.pattern(request.by_value)
        n = weight.shape[2]
        mass = weight.reshape(b, h * n, -1) @ sets[:, block.keys].expand(b, -1, -1)
        return mass.view(b, h, n, -1) / total

    return _by_rows(reduce, _zeros(call, sets.shape[-1]))


@_accumulator.register
def _(request: At, call: Call, queries: Tensor | None) -> Step:
    def reduce(block: Block) -> Tensor:
        weight, total = block.pattern(request.by_value)
        asked = request.keys[:, block.rows]
        local = asked - (call.k_start + block.keys.start)
        there = (local >= 0) & (local < weight.shape[-1]) & (asked >= 0)
        if not weight.shape[-1]:
            return weight.new_zeros(*weight.shape[:3], asked.shape[-1])
        where = local.clamp(0, weight.shape[-1] - 1)[:, None].expand(*weight.shape[:2], -1, -1)
        return weight.gather(-1, where) / total * there[:, None]

    return _by_rows(reduce, _zeros(call, request.keys.shape[-1]))


@_accumulator.register
def _(request: Columns, call: Call, queries: Tensor | None) -> Step:
    b, h, _, n, n_keys = call.sizes
    weights = torch.ones(b, n, dtype=call.dtype, device=call.q.device)
    if request.weights is not None:
        weights = request.weights.to(call.dtype).expand(b, -1)
        weights = weights if queries is None else weights[:, queries]
    received = torch.zeros(b, h, n_keys, dtype=call.dtype, device=call.q.device)
    seen = torch.zeros(b, 1, n_keys, dtype=call.dtype, device=call.q.device)
    if call.mask is not None or call.key_bias is not None or call.row_coef is not None:
        seen = torch.zeros_like(received)

    def add(block: Block) -> None:
        weight, total = block.pattern(request.by_value)
        rows = weights[:, None, block.rows, None]
        part = received[:, :, block.keys]
        if request.stat == "sum":
            part += ((rows / total).transpose(-1, -2) @ weight)[:, :, 0]
        elif weight.shape[-1]:
            torch.maximum(part, (weight * (rows / total)).amax(2), out=part)
        visible = call.visible(block.rows, block.keys)
        seen[..., block.keys] += (visible * rows).sum(2)

    return add, lambda: (received, seen.expand(b, h, -1))


@_accumulator.register
def _(request: Blocks, call: Call, queries: Tensor | None) -> Step:
    start, n, m, row_block, key_block = block_grid(call, request, None)
    b, h = call.sizes[:2]
    sums = torch.zeros(b, h, n, m, dtype=call.dtype, device=call.q.device)
    rows_in = torch.zeros(b, n, dtype=call.dtype, device=call.q.device)
    key_in = torch.nn.functional.one_hot(key_block, m).to(call.dtype)

    def add(block: Block) -> None:
        by_key = _blocks_of(block, key_in)
        row_in = torch.nn.functional.one_hot(row_block[:, block.rows], n).to(call.dtype)
        sums.add_(torch.einsum("bhrm,brn->bhnm", by_key, row_in))
        live = ~block.dead.all(1)
        rows_in.add_((live[..., None] * row_in).sum(1))

    return add, lambda: (start, sums, rows_in)


def _blocks_of(block: Block, key_in: Tensor) -> Tensor:
    """[b h r m] mass of each row on each block of keys."""
    b, h, n = block.weight.shape[:3]
    mass = block.weight.reshape(b, h * n, -1) @ key_in[:, block.keys].expand(b, -1, -1)
    return mass.view(b, h, n, -1) / block.denominator
