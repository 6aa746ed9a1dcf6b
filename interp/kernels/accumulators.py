"""What is taken out of a block of rows of the pattern: one accumulator for each request."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.kernels.contract import At, Blocks, Call, Columns, Entropy, Lse, Mass, Request, TopKeys, block_grid

BITS = math.log2(math.e)
"""logits are held in bits, since powers of two are several times as fast as exp on a CPU"""

TILE = 64
"""keys compared at once for the argmax: the maximum is found by tile, the key inside the winning tile"""


@dataclass(eq=False)
class Workspace:
    """Memory that the blocks of one call use again and again: fresh blocks of every size would scatter the heap."""

    dtype: torch.dtype
    device: torch.device
    least: int = 0
    """numbers to hold under a name from the start: one that grows is taken from the heap again"""
    _held: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor; the one that was taken under the same name before is overwritten."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = torch.empty(max(size, self.least), dtype=self.dtype, device=self.device)
        return held[:size].view(shape)


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
    """[b h r k] (logit - max) in bits, a large negative number where nothing is seen"""
    tiles: Tensor
    """[b h r t] the largest logit of each tile of keys, in bits"""
    peak: Tensor
    """[b h r 1] max in bits, that of a learned sink where it is larger"""
    total: Tensor
    """[b h r 1] sum of weight over keys, without a learned sink; 1 on dead rows"""
    denominator: Tensor
    """[b h r 1] the same with the learned sink"""
    dead: Tensor
    """Bool [b h r] rows that see nothing"""
    space: Workspace
    value_norm: Tensor | None = None
    """[b h 1 k]"""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """[b h r s] unnormalised masses that came out of the product with v, by id of their request"""
    _valued: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, call: Call, rows: slice, keys: slice, score: Tensor, hidden: float, space: Workspace, norm: Tensor | None
    ) -> "Block":
        """The block of logits `score` [b h r k], in bits and `hidden` where a row may not look.

        Without gradients `score` is overwritten, and weights live in `space`.
        """
        tiles = tile_peaks(score.detach())
        peak = tiles.amax(-1, keepdim=True)
        dead = peak[..., 0] <= hidden / 2
        sink = None
        if call.sinks is not None:
            sink = call.sinks.to(score.dtype)[None, :, None, None] * BITS
            peak = torch.maximum(peak, sink.detach().expand(peak.shape))
        if torch.is_grad_enabled():
            shifted = score - peak
            weight = torch.exp2(shifted)
        else:
            shifted = score.sub_(peak)
            weight = torch.exp2(shifted, out=space.take("weight", *score.shape))
        if bool(dead.any()):
            weight = weight.masked_fill(dead[..., None], 0.0)
        total = weight.sum(-1, keepdim=True)
        denominator = total if sink is None else total + torch.exp2(sink - peak)
        denominator = denominator.masked_fill(dead[..., None], 1.0)
        return cls(call, rows, keys, weight, shifted, tiles, peak, total, denominator, dead, space, norm)

    def pattern(self, by_value: bool = False) -> tuple[Tensor, Tensor]:
        """Unnormalised weights [b h r k] and what to divide them by [b h r 1]."""
        if not by_value:
            return self.weight, self.denominator
        if self.value_norm is None:
            raise UsageError("weights by value were asked of a block that was made without the norms of values.")
        if self._valued is None:
            self._valued = torch.mul(self.weight, self.value_norm, out=self.space.take("valued", *self.weight.shape))
        total = self._valued.sum(-1, keepdim=True)
        return self._valued, total.clamp(min=torch.finfo(total.dtype).tiny)


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
def accumulator(request: Request, call: Call, queries: Tensor | None) -> Step:
    raise NotImplementedError(type(request).__name__)


@singledispatch
def join(request: Request, parts: list[Any]) -> Any:
    """One value out of those of several runs of heads, in their order."""
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))
    return torch.cat(parts, 1)


@join.register
def _(request: Blocks, parts: list[Any]) -> Any:
    # the grid and its live rows are the same for every head
    start, _, rows_in = parts[0]
    return start, torch.cat([sums for _, sums, _ in parts], 1), rows_in


def _zeros(call: Call, *rest: int) -> Callable[[], Tensor]:
    return lambda: call.q.new_zeros(*call.sizes[:2], 0, *rest, dtype=call.dtype)


@accumulator.register
def _(request: Lse, call: Call, queries: Tensor | None) -> Step:
    def reduce(block: Block) -> Tensor:
        lse = (block.peak + block.denominator.log2())[..., 0] / BITS
        return lse.masked_fill(block.dead, -torch.inf)

    return _by_rows(reduce, _zeros(call))


@accumulator.register
def _(request: Entropy, call: Call, queries: Tensor | None) -> Step:
    def reduce(block: Block) -> Tensor:
        # log l - E[s - max], which stays exact at large logits where lse - E[s] does not
        if call.sinks is not None:
            return _entropy_of_keys(block)
        total = block.total[..., 0].masked_fill(block.dead, 1.0)
        product = torch.mul(block.weight, block.shifted, out=block.space.take("product", *block.weight.shape))
        return total.log() - product.sum(-1) / (total * BITS)

    return _by_rows(reduce, _zeros(call))


def _entropy_of_keys(block: Block) -> Tensor:
    """[b h r] by the keys' own maximum: a learned sink far above it would leave nothing of their weights."""
    if not block.shifted.shape[-1]:
        return block.peak[..., 0] * 0.0
    shifted = block.shifted - block.shifted.amax(-1, keepdim=True)
    weight = torch.exp2(shifted)
    total = weight.sum(-1)
    return (total.log() - (weight * shifted).sum(-1) / (total * BITS)).masked_fill(block.dead, 0.0)


@accumulator.register
def _(request: TopKeys, call: Call, queries: Tensor | None) -> Step:
    def reduce(block: Block) -> tuple[Tensor, Tensor]:
        have = min(request.k, block.weight.shape[-1])
        best = _first_max(block) if request.k == 1 and have else stable_top(block.shifted, have)
        probs = block.weight.gather(-1, best) / block.denominator
        found = block.shifted.gather(-1, best) > torch.finfo(call.dtype).min / 8
        keys = torch.where(found & ~block.dead[..., None], best + (call.k_start + block.keys.start), -1)
        pad = (0, request.k - have)
        return torch.nn.functional.pad(keys, pad, value=-1), torch.nn.functional.pad(probs * found, pad)

    return _by_rows(reduce, lambda: (_zeros(call, request.k)().long(), _zeros(call, request.k)()))


def tile_peaks(x: Tensor) -> Tensor:
    """[... t] maximum of each tile of the last axis; the last tile may be a part of one."""
    n = x.shape[-1]
    whole = n - n % TILE
    peaks = [x[..., :whole].unflatten(-1, (-1, TILE)).amax(-1)] if whole else []
    if n > whole:
        peaks.append(x[..., whole:].amax(-1, keepdim=True))
    return torch.cat(peaks, -1) if len(peaks) > 1 else peaks[0]


def _first_max(block: Block) -> Tensor:
    """[b h r 1] index of the largest logit of each row, the lowest where several are equal."""
    x, n = block.shifted, block.shifted.shape[-1]
    if n < TILE:
        return _first(x == x.amax(-1, keepdim=True))
    tile = _first(block.tiles == block.tiles.amax(-1, keepdim=True))
    start = (tile * TILE).clamp(max=n - TILE)
    near = x.gather(-1, start + torch.arange(TILE, device=x.device))
    # the last tile may reach back into its neighbour, which holds no value as large, or the neighbour had won
    return start + _first(near == near.amax(-1, keepdim=True))


def _first(hit: Tensor) -> Tensor:
    """[... 1] index of the first True; argmax does not promise the first one everywhere."""
    place = torch.arange(hit.shape[-1], device=hit.device, dtype=torch.int32)
    return torch.where(hit, place, hit.shape[-1] - 1).amin(-1, keepdim=True).long()


def stable_top(x: Tensor, k: int) -> Tensor:
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


@accumulator.register
def _(request: Mass, call: Call, queries: Tensor | None) -> Step:
    sets = request.sets.to(call.dtype).transpose(-1, -2)
    b, h = call.sizes[:2]

    def reduce(block: Block) -> Tensor:
        if id(request) in block.sums:
            return block.sums[id(request)] / block.denominator
        weight, total = block.pattern(request.by_value)
        n = weight.shape[2]
        mass = weight.reshape(b, h * n, -1) @ sets[:, block.keys].expand(b, -1, -1)
        return mass.view(b, h, n, -1) / total

    return _by_rows(reduce, _zeros(call, sets.shape[-1]))


@accumulator.register
def _(request: At, call: Call, queries: Tensor | None) -> Step:
    def reduce(block: Block) -> Tensor:
        weight, total = block.pattern(request.by_value)
        asked = request.keys[:, block.rows]
        local = asked - (call.k_start + block.keys.start)
        there = (local >= 0) & (local < weight.shape[-1]) & (asked >= 0)
        if not weight.shape[-1]:
            return weight.new_zeros(*weight.shape[:3], *([] if request.total else [asked.shape[-1]]))
        where = local.clamp(0, weight.shape[-1] - 1)[:, None].expand(*weight.shape[:2], -1, -1)
        found = weight.gather(-1, where) / total * there[:, None]
        return found.sum(-1) if request.total else found

    return _by_rows(reduce, _zeros(call) if request.total else _zeros(call, request.keys.shape[-1]))


@accumulator.register
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
            share = torch.mul(weight, rows / total, out=block.space.take("product", *weight.shape))
            torch.maximum(part, share.amax(2), out=part)
        visible = call.visible(block.rows, block.keys)
        seen[..., block.keys] += (visible * rows).sum(2)

    return add, lambda: (received, seen.expand(b, h, -1))


@accumulator.register
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
