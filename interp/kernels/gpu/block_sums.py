"""Triton: blocks of rows by blocks of keys, from the sums of tiles that the forward pass leaves.

Blocks count from each prompt's first token. Tiles are moved so that none lies across the border of two blocks. A sum is
kept for each row and tile, neighbouring rows beside each other, until the log-sum-exp of the row is known.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# what triton's launches take is not typed

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.contract import Blocks, Call, block_grid
from interp.kernels.gpu.tile_sizes import Tiling, pieces
from interp.kernels.gpu.tiles import LOG2E, Operands, extent, place, reach, row_columns

SMALLEST, LARGEST = 16, 1024
"""blocks that the kernel adds up"""
TABLE = 1 << 28
"""bytes of a map of finer blocks, from which coarser ones are made"""
STRIP = tl.constexpr(64)
"""tiles of keys whose sums are finished at once"""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """How one request for blocks is served by the forward pass."""

    request: Blocks
    rows: int
    """rows of a block as the kernel adds them up: a block, or a tile where a block is larger"""
    row_shift: list[int]
    key_shift: list[int]
    """[b] where the first tile of rows and the first block of keys begin, at or before 0"""
    tiling: Tiling
    ratio: int = 1
    """blocks of the kernel in one that was asked for, each way"""

    @classmethod
    def of(cls, call: Call, asked: Blocks, tiles: Tiling) -> "BlockPlan | None":
        """The plan, or None where tiles cannot be cut at the borders of blocks.

        Sizes that the kernel does not know are put together from the largest that it knows, 1536 from 512.
        """
        size = min(asked.size & -asked.size, LARGEST)
        request = Blocks(size, asked.first)
        ratio = asked.size // size
        if call.row_columns is not None or size < SMALLEST:
            return None
        b, h, _, n, m = call.sizes
        if ratio > 1 and 4 * b * h * n * m > TABLE * size * size:
            return None
        # the kernel for Hopper moves no tiles and cuts none: blocks are as large and begin where tiles do
        moved = (call.q_start | call.k_start) % size or any(first % size for first in request.starts)
        if tiles.groups and (size < tiles.keys or moved):
            return None
        tiles = replace(tiles, keys=min(tiles.keys, size))
        if STRIP.value * tiles.keys < size:
            return None
        rows = min(size, tiles.rows)
        row_shift = [-((call.q_start - first) % rows) for first in request.starts]
        key_shift = [-((call.k_start - first) % size) for first in request.starts]
        return cls(request, rows, row_shift, key_shift, tiles, ratio)

    def shifts(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """row_shift and key_shift as the kernels read them: int32 [b]."""
        if not any(self.row_shift + self.key_shift):
            # a fill, where numbers would be a copy that the device waits for
            none = torch.zeros(len(self.row_shift), dtype=torch.int32, device=device)
            return none, none
        rows, keys = (torch.tensor(x, dtype=torch.int32, device=device) for x in (self.row_shift, self.key_shift))
        return rows, keys

    def k_tiles(self, m: int) -> int:
        """Tiles of keys, moved as they may be."""
        return self.k_blocks(m) * self.request.size // self.tiling.keys

    def k_blocks(self, m: int) -> int:
        """Blocks of keys, moved as they may be."""
        return (m + 2 * (self.request.size - 1)) // self.request.size

    def empty(self, b: int, h: int, row_tiles: int, m: int, device: torch.device) -> Tensor:
        """Where the kernel puts its blocks: float32 [b h n m]; Hopper's leaves tiles of keys apart."""
        n = row_tiles * self.tiling.rows // self.rows
        return torch.zeros(b, h, n, self.k_tiles(m) if self.tiling.groups else self.k_blocks(m), device=device)

    def table(self, call: Call, table: Tensor, lse: Tensor) -> tuple[int, Tensor, Tensor]:
        """The contract's (start, sums [b h n m], live rows [b n]) from the kernel's table of blocks."""
        b, h = call.sizes[:2]
        size = self.request.size
        start, n, m, row_block, _ = block_grid(call, self.request, None)
        sums = torch.zeros(b, h, n, m, dtype=table.dtype, device=table.device)
        ratio = size // self.rows
        for i, first in enumerate(self.request.starts):
            row = (self.row_shift[i] + call.q_start - first) // self.rows
            key = (self.key_shift[i] + call.k_start - first) // size
            part = _grouped(table[i], 1, ratio, row % ratio)
            part = _grouped(part, 2, part.shape[2] // self.k_blocks(call.sizes[4]), 0)
            part = _folded(_folded(part, 1, -(row // ratio)), 2, -key)
            _overlay(sums[i], part, max(row // ratio, 0) - start, max(key, 0))
        live = (lse > -torch.inf).any(1).to(table.dtype)
        rows = torch.zeros(b, n, dtype=table.dtype, device=table.device).scatter_add_(1, row_block, live)
        before = start % self.ratio
        rows = _grouped(rows[..., None], 1, self.ratio, before)[..., 0]
        sums = _grouped(_grouped(sums.flatten(0, 1), 1, self.ratio, before), 2, self.ratio, 0).unflatten(0, (b, h))
        return start // self.ratio, sums, rows


def _grouped(part: Tensor, axis: int, size: int, before: int) -> Tensor:
    """Sums of `size` neighbours along an axis, of which the first group lacks `before`."""
    if size == 1:
        return part
    after = -(before + part.shape[axis]) % size
    pad = (0, 0, before, after) if axis == 1 else (before, after)
    return torch.nn.functional.pad(part, pad).unflatten(axis, (-1, size)).sum(axis + 1)


def _folded(part: Tensor, axis: int, before: int) -> Tensor:
    """What lies before a prompt's first token belongs to its first block."""
    if before <= 0:
        return part
    first, rest = part.tensor_split([before + 1], axis)
    return torch.cat([first.sum(axis, keepdim=True), rest], axis)


def _overlay(onto: Tensor, part: Tensor, row: int, key: int) -> None:
    """Write part[h n m] into onto[h N M] with its corner at (row, key), which may lie outside."""
    n, m = onto.shape[1:]
    rows, keys = slice(max(row, 0), min(n, row + part.shape[1])), slice(max(key, 0), min(m, key + part.shape[2]))
    if rows.stop > rows.start and keys.stop > keys.start:
        onto[:, rows, keys] = part[:, rows.start - row : rows.stop - row, keys.start - key : keys.stop - key]


@triton.jit
def _finish(
    op, to, row_tiles, offset,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, RB: tl.constexpr, KB: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    slot, strip = tl.program_id(0), tl.program_id(1)
    b, _, h, start_row = place(op, slot + offset, row_tiles, BM)
    first_row = start_row + tl.load(to.row_shift + b)
    shift = tl.load(to.key_shift + b)
    row = first_row + tl.arange(0, BM)
    inside = (row >= 0) & (row < op.n_q)
    low, high = extent(op, first_row, inside, row_columns(op, row), BM)
    lo, _, _, hi = reach(op, b, low, high, shift, BN, CAUSAL)
    # rows that see nothing have a log-sum-exp of -inf
    norm = tl.load(to.lse + (b * op.heads + h).to(tl.int64) * op.n_q + row, mask=inside, other=float("-inf")) * LOG2E
    tile = strip * STRIP + tl.arange(0, STRIP)
    there = (tile * BN + shift >= lo) & (tile * BN + shift < hi) & (tile < to.tiles)
    at = to.scratch + slot.to(tl.int64) * to.tiles * BM + tile[:, None] * BM + tl.arange(0, BM)[None, :]
    mask = there[:, None] & (norm > float("-inf"))[None, :]
    share = tl.where(mask, tl.exp2(tl.load(at, mask=mask, other=0.0) - norm[None, :]), 0.0)
    sums = tl.sum(tl.reshape(share, (STRIP // KB, KB, BM // RB, RB)), 3)
    sums = tl.sum(sums, 1)
    block = start_row // RB + tl.arange(0, BM // RB)
    key_block = strip * (STRIP // KB) + tl.arange(0, STRIP // KB)
    line = (b * op.heads + h).to(tl.int64) * to.map_n + block
    there = (key_block < to.map_m)[:, None] & (block < to.map_n)[None, :]
    tl.store(to.map + line[None, :] * to.map_m + key_block[:, None], sums, mask=there)


def finish(
    op: Operands, to: Any, plan: BlockPlan, known: dict[str, Any], row_tiles: int, offset: int, count: int
) -> None:
    """Add the sums of tiles that `count` programs of the forward pass left up to blocks, in the plan's table."""
    tiles = plan.tiling
    _finish[(count, pieces(to.tiles, STRIP.value))](
        op,
        to,
        row_tiles,
        offset,
        BM=tiles.rows,
        BN=tiles.keys,
        CAUSAL=known["CAUSAL"],
        RB=plan.rows,
        KB=plan.request.size // tiles.keys,
        LOG2E=LOG2E,
        num_warps=4,
    )
