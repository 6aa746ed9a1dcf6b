"""Reductions over blocks of rows of the pattern: one accumulator for each request."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.kernels.block_sums import sum_blocks
from interp.kernels.contract import At, Blocks, Call, Columns, Entropy, Lse, Mass, Request, TopKeys, block_grid

BITS_PER_NAT = math.log2(math.e)
"""Logits are stored in bits, because powers of two are several times as fast as exp on a CPU."""

KEYS_PER_TILE = 64
"""Keys of a tile of the argmax, which first finds the tile with the maximum and then the key in this tile."""


@dataclass(eq=False)
class Workspace:
    """Memory that all blocks of one call reuse. New tensors of different sizes would fragment the heap."""

    dtype: torch.dtype
    device: torch.device
    min_elements: int = 0
    """Smallest size of a buffer, because a buffer that has to grow is allocated again."""
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor that shares memory with the previous one of the same name.

        Args:
            name: Name of the buffer.
            shape: Shape of the tensor.

        Returns:
            Tensor: The tensor. Writing to it overwrites earlier tensors of this name.
        """
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(max(size, self.min_elements), dtype=self.dtype, device=self.device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


@dataclass(eq=False)
class RowBlock:
    """A block of rows of the pattern over a range of keys, from which the reductions are computed."""

    call: Call
    rows: slice
    """Indices of the rows among the queries that are read."""
    keys: slice
    """Range of the keys that the block covers."""
    weight: Tensor
    """[b h r k] exp(logit - max): not normalised, 0 for keys that are not visible."""
    shifted: Tensor
    """[b h r k] logit - max in bits, a large negative number for keys that are not visible."""
    tiles: Tensor
    """[b h r t] largest logit of each tile of keys, in bits."""
    peak: Tensor
    """[b h r 1] max in bits, or the logit of the learned sink if it is larger."""
    total: Tensor
    """[b h r 1] sum of weight over keys, without a learned sink; 1 on dead rows."""
    denominator: Tensor
    """[b h r 1] sum of weight over keys and the learned sink; 1 on dead rows."""
    dead: Tensor
    """Bool [b h r], rows that see no key."""
    space: Workspace
    """Memory for intermediate results."""
    value_norm: Tensor | None = None
    """[b h 1 k] norms of the values."""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """[b h r s] masses from the product with v, not normalised, by the id of their request."""
    _weighted_by_value: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, call: Call, rows: slice, keys: slice, score: Tensor, hidden: float, space: Workspace, norm: Tensor | None
    ) -> "RowBlock":
        """Compute the softmax of a block of logits.

        Without gradients, `score` is overwritten and the weights are stored in `space`.

        Args:
            call: The attention call.
            rows: Indices of the rows among the queries that are read.
            keys: Range of the keys that the block covers.
            score: [b h r k] logits in bits, `hidden` for keys that are not visible.
            hidden: A large negative number.
            space: Memory for intermediate results.
            norm: [b h 1 k] norms of the values; None if no request needs them.

        Returns:
            RowBlock: The block.
        """
        tiles = tile_peaks(score.detach())
        peak = tiles.amax(-1, keepdim=True)
        dead = peak[..., 0] <= hidden / 2
        sink = None
        if call.sinks is not None:
            sink = call.sinks.to(score.dtype)[None, :, None, None] * BITS_PER_NAT
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
        """Return the weights and their denominator, whose quotient is the pattern.

        Args:
            by_value: Weight each key by the norm of its value.

        Returns:
            tuple: Weights [b h r k] and denominator [b h r 1].

        Raises:
            UsageError: If `by_value` is set and the block has no norms of values.
        """
        if not by_value:
            return self.weight, self.denominator
        if self.value_norm is None:
            raise UsageError("this block has no norms of values; pass `norm` to RowBlock.of to weight keys by value.")
        if self._weighted_by_value is None:
            self._weighted_by_value = torch.mul(
                self.weight, self.value_norm, out=self.space.take("valued", *self.weight.shape)
            )
        total = self._weighted_by_value.sum(-1, keepdim=True)
        return self._weighted_by_value, total.clamp(min=torch.finfo(total.dtype).tiny)


Accumulator = tuple[Callable[[RowBlock], None], Callable[[], Any]]
"""A function that adds a block of rows, and one that returns the value after all blocks."""


def _per_row(
    reduce: Callable[[RowBlock], Tensor | tuple[Tensor, ...]], call: Call, empty: Callable[[], Any]
) -> Accumulator:
    """A reduction whose value has one entry per row.

    The values of the blocks are written to tensors that are made once. If they were kept until the end, each would lie
    in memory that a larger tensor has just left, which the next block could not use again.
    """
    whole: list[Tensor] = []
    single: list[bool] = []

    def add(block: RowBlock) -> None:
        found = reduce(block)
        parts = (found,) if isinstance(found, Tensor) else found
        if not whole:
            single.append(isinstance(found, Tensor))
            whole.extend(part.new_empty(*part.shape[:2], call.sizes[3], *part.shape[3:]) for part in parts)
        for place, part in zip(whole, parts, strict=True):
            place[:, :, block.rows] = part

    def value() -> Any:
        if not whole:
            return empty()
        return whole[0] if single[0] else tuple(whole)

    return add, value


@singledispatch
def accumulator(request: Request, call: Call, queries: Tensor | None) -> Accumulator:
    """Return the accumulator of a request.

    Args:
        request: The reduction.
        call: The attention call. If `queries` is given, it holds only those rows.
        queries: Int [r], indices of the rows among the queries of the whole call; None for all.

    Returns:
        tuple: A function that adds a RowBlock, and a function that returns the value.
    """
    raise NotImplementedError(type(request).__name__)


@singledispatch
def join(request: Request, parts: list[Any]) -> Any:
    """Join the values that a request has for consecutive runs of heads.

    Args:
        request: The reduction.
        parts: One value per run of heads, in the order of the heads.

    Returns:
        Any: The value for all heads.
    """
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
def _(request: Lse, call: Call, queries: Tensor | None) -> Accumulator:
    def reduce(block: RowBlock) -> Tensor:
        lse = (block.peak + block.denominator.log2())[..., 0] / BITS_PER_NAT
        return lse.masked_fill(block.dead, -torch.inf)

    return _per_row(reduce, call, _zeros(call))


@accumulator.register
def _(request: Entropy, call: Call, queries: Tensor | None) -> Accumulator:
    def reduce(block: RowBlock) -> Tensor:
        # log l - E[s - max] stays exact at large logits, while lse - E[s] does not
        if call.sinks is not None:
            return _entropy_of_keys(block)
        total = block.total[..., 0].masked_fill(block.dead, 1.0)
        product = torch.mul(block.weight, block.shifted, out=block.space.take("product", *block.weight.shape))
        return total.log() - product.sum(-1) / (total * BITS_PER_NAT)

    return _per_row(reduce, call, _zeros(call))


def _entropy_of_keys(block: RowBlock) -> Tensor:
    """[b h r] relative to the maximum over keys; relative to a much larger learned sink all weights would be 0."""
    if not block.shifted.shape[-1]:
        return block.peak[..., 0] * 0.0
    shifted = block.shifted - block.shifted.amax(-1, keepdim=True)
    weight = torch.exp2(shifted)
    total = weight.sum(-1)
    return (total.log() - (weight * shifted).sum(-1) / (total * BITS_PER_NAT)).masked_fill(block.dead, 0.0)


@accumulator.register
def _(request: TopKeys, call: Call, queries: Tensor | None) -> Accumulator:
    def reduce(block: RowBlock) -> tuple[Tensor, Tensor]:
        have = min(request.k, block.weight.shape[-1])
        best = _first_max(block) if request.k == 1 and have else stable_top_k(block.shifted, have)
        probs = block.weight.gather(-1, best) / block.denominator
        found = block.shifted.gather(-1, best) > torch.finfo(call.dtype).min / 8
        keys = torch.where(found & ~block.dead[..., None], best + (call.k_start + block.keys.start), -1)
        pad = (0, request.k - have)
        return torch.nn.functional.pad(keys, pad, value=-1), torch.nn.functional.pad(probs * found, pad)

    return _per_row(reduce, call, lambda: (_zeros(call, request.k)().long(), _zeros(call, request.k)()))


def tile_peaks(x: Tensor) -> Tensor:
    """Compute the maximum of each tile of the last axis.

    Args:
        x: [... k], any tensor. The last tile may be incomplete.

    Returns:
        Tensor: [... t].
    """
    n = x.shape[-1]
    whole = n - n % KEYS_PER_TILE
    peaks = [x[..., :whole].unflatten(-1, (-1, KEYS_PER_TILE)).amax(-1)] if whole else []
    if n > whole:
        peaks.append(x[..., whole:].amax(-1, keepdim=True))
    return torch.cat(peaks, -1) if len(peaks) > 1 else peaks[0]


def _first_max(block: RowBlock) -> Tensor:
    """[b h r 1] index of the largest logit of each row, the lowest index if several are equal."""
    x, n = block.shifted, block.shifted.shape[-1]
    if n < KEYS_PER_TILE:
        return _first(x == x.amax(-1, keepdim=True))
    tile = _first(block.tiles == block.tiles.amax(-1, keepdim=True))
    start = (tile * KEYS_PER_TILE).clamp(max=n - KEYS_PER_TILE)
    near = x.gather(-1, start + torch.arange(KEYS_PER_TILE, device=x.device))
    # the last tile may overlap its neighbour, which has no value as large, because otherwise it would have won
    return start + _first(near == near.amax(-1, keepdim=True))


def _first(hit: Tensor) -> Tensor:
    """[... 1] index of the first True. On some devices argmax may return another one."""
    place = torch.arange(hit.shape[-1], device=hit.device, dtype=torch.int32)
    return torch.where(hit, place, hit.shape[-1] - 1).amin(-1, keepdim=True).long()


def stable_top_k(x: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest values, with ties resolved to the lowest index.

    Args:
        x: [... n], the values.
        k: Number of values, at most n.

    Returns:
        Tensor: Int64 [... k], from the largest value to the smallest.
    """
    if k == 0:
        return x.new_zeros(*x.shape[:-1], 0, dtype=torch.int64)
    values, index = x.topk(k, -1)
    # topk may return any of several equal keys at its cut, so rows with ties are sorted
    tied = (x == values[..., -1:]).sum(-1) > (values == values[..., -1:]).sum(-1)
    tied |= (values[..., 1:] == values[..., :-1]).any(-1)
    if bool(tied.any()):
        index[tied] = x[tied].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return index


@accumulator.register
def _(request: Mass, call: Call, queries: Tensor | None) -> Accumulator:
    sets = request.sets.to(call.dtype).transpose(-1, -2)
    b, h = call.sizes[:2]

    def reduce(block: RowBlock) -> Tensor:
        if id(request) in block.sums:
            return block.sums[id(request)] / block.denominator
        weight, total = block.pattern(request.by_value)
        if sets.dim() == 4:
            return weight @ sets[:, :, block.keys] / total
        n = weight.shape[2]
        mass = weight.reshape(b, h * n, -1) @ sets[:, block.keys].expand(b, -1, -1)
        return mass.view(b, h, n, -1) / total

    return _per_row(reduce, call, _zeros(call, sets.shape[-1]))


@accumulator.register
def _(request: At, call: Call, queries: Tensor | None) -> Accumulator:
    def reduce(block: RowBlock) -> Tensor:
        weight, total = block.pattern(request.by_value)
        listed = request.keys[:, block.rows]
        local = listed - (call.k_start + block.keys.start)
        there = (local >= 0) & (local < weight.shape[-1]) & (listed >= 0)
        if not weight.shape[-1]:
            return weight.new_zeros(*weight.shape[:3], *([] if request.total else [listed.shape[-1]]))
        where = local.clamp(0, weight.shape[-1] - 1)[:, None].expand(*weight.shape[:2], -1, -1)
        found = weight.gather(-1, where) / total * there[:, None]
        return found.sum(-1) if request.total else found

    return _per_row(reduce, call, _zeros(call) if request.total else _zeros(call, request.keys.shape[-1]))


@accumulator.register
def _(request: Columns, call: Call, queries: Tensor | None) -> Accumulator:
    b, h, _, n, n_keys = call.sizes
    weights = torch.ones(b, n, dtype=call.dtype, device=call.q.device)
    if request.weights is not None:
        weights = request.weights.to(call.dtype).expand(b, -1)
        weights = weights if queries is None else weights[:, queries]
    received = torch.zeros(b, h, n_keys, dtype=call.dtype, device=call.q.device)
    seen = torch.zeros(b, 1, n_keys, dtype=call.dtype, device=call.q.device)
    if call.mask is not None or call.key_bias is not None or call.row_coef is not None:
        seen = torch.zeros_like(received)

    def add(block: RowBlock) -> None:
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
def _(request: Blocks, call: Call, queries: Tensor | None) -> Accumulator:
    start, n, m, row_block, _ = block_grid(call, request, None)
    b, h = call.sizes[:2]
    sums = torch.zeros(b, h, n, m, dtype=call.dtype, device=call.q.device)
    rows_in = torch.zeros(b, n, dtype=call.dtype, device=call.q.device)

    def add(block: RowBlock) -> None:
        columns = [first - call.k_start - block.keys.start for first in request.starts]
        by_key = sum_blocks(block.weight, columns, request.size, m) / block.denominator
        live = (~block.dead.all(1)).to(call.dtype)
        for i, number in enumerate(row_block[:, block.rows]):
            sums[i].index_add_(1, number, by_key[i])
            rows_in[i].index_add_(0, number, live[i])

    return add, lambda: (start, sums, rows_in)
