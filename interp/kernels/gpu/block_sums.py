"""Triton: sums over blocks of rows and keys, from the sums of tiles that the forward pass stores.

Blocks are counted from the first token of each prompt. Tiles are shifted so that none crosses the border of two
blocks. The forward pass stores one sum per row and tile, with neighbouring rows adjacent in memory, until the
log-sum-exp of the row is known.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# launches of triton kernels are not typed

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.contract import Blocks, Call, block_grid
from interp.kernels.gpu.tile_sizes import Tiling, ceil_div
from interp.kernels.gpu.tiles import LOG2E, Operands, extent, place, reach, row_columns

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 16, 1024
"""Sizes of blocks that the kernel can sum."""
MAX_MAP_BYTES = 1 << 28
"""Largest size of a map of small blocks from which a map of larger blocks is computed."""
TILES_PER_STRIP = tl.constexpr(64)
"""Tiles of keys that one program of the second kernel reduces."""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """How the forward pass computes the blocks of one request."""

    request: Blocks
    """The request with the block size of the kernel."""
    rows: int
    """Rows that the kernel sums: those of a block, or those of a tile if a block is larger."""
    row_shift: list[int]
    """[b] start of the first tile of rows, 0 or negative."""
    key_shift: list[int]
    """[b] start of the first block of keys, 0 or negative."""
    tiling: Tiling
    """Tiling of the forward pass."""
    ratio: int = 1
    """Number of blocks of the kernel along each side of a requested block."""

    @classmethod
    def of(cls, call: Call, requested: Blocks, tiles: Tiling) -> "BlockPlan | None":
        """Plan the blocks of a request.

        A size that the kernel does not support is composed of the largest size that it supports, such as 1536 of 512.

        Args:
            call: The attention call.
            requested: The request.
            tiles: Tiling of the forward pass.

        Returns:
            BlockPlan | None: The plan; None if the tiles cannot be aligned with the borders of the blocks.
        """
        size = min(requested.size & -requested.size, MAX_BLOCK_SIZE)
        request = Blocks(size, requested.first)
        ratio = requested.size // size
        if call.row_columns is not None or size < MIN_BLOCK_SIZE:
            return None
        b, h, _, n, m = call.sizes
        if ratio > 1 and 4 * b * h * n * m > MAX_MAP_BYTES * size * size:
            return None
        # the kernel for Hopper does not shift or shrink tiles, so blocks must be as large and must start with a tile
        moved = (call.q_start | call.k_start) % size or any(first % size for first in request.starts)
        if tiles.groups and (size < tiles.keys or moved):
            return None
        tiles = replace(tiles, keys=min(tiles.keys, size))
        if TILES_PER_STRIP.value * tiles.keys < size:
            return None
        rows = min(size, tiles.rows)
        row_shift = [-((call.q_start - first) % rows) for first in request.starts]
        key_shift = [-((call.k_start - first) % size) for first in request.starts]
        return cls(request, rows, row_shift, key_shift, tiles, ratio)

    def shifts(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the shifts in the form that the kernels read.

        Args:
            device: The device of the call.

        Returns:
            tuple: row_shift and key_shift, int32 [b].
        """
        if not any(self.row_shift + self.key_shift):
            # filling memory does not wait for the device, unlike copying numbers to it
            zeros = torch.zeros(len(self.row_shift), dtype=torch.int32, device=device)
            return zeros, zeros
        rows, keys = (torch.tensor(x, dtype=torch.int32, device=device) for x in (self.row_shift, self.key_shift))
        return rows, keys

    def k_tiles(self, m: int) -> int:
        """Return the number of tiles of keys, including the shift.

        Args:
            m: Number of keys.

        Returns:
            int: The number of tiles.
        """
        return self.k_blocks(m) * self.request.size // self.tiling.keys

    def k_blocks(self, m: int) -> int:
        """Return the number of blocks of keys, including the shift.

        Args:
            m: Number of keys.

        Returns:
            int: The number of blocks.
        """
        return (m + 2 * (self.request.size - 1)) // self.request.size

    def empty(self, b: int, h: int, row_tiles: int, m: int, device: torch.device) -> Tensor:
        """Create the map that the kernel writes its sums to.

        Args:
            b: Number of prompts.
            h: Number of query heads.
            row_tiles: Number of tiles of rows.
            m: Number of keys.
            device: The device of the call.

        Returns:
            Tensor: float32 [b h n m] zeros. The kernel for Hopper writes tiles of keys instead of blocks of keys.
        """
        n = row_tiles * self.tiling.rows // self.rows
        return torch.zeros(b, h, n, self.k_tiles(m) if self.tiling.groups else self.k_blocks(m), device=device)

    def block_values(self, call: Call, table: Tensor, lse: Tensor) -> tuple[int, Tensor, Tensor]:
        """Convert the map of the kernel to the value of the request.

        Args:
            call: The attention call.
            table: float32 [b h n m], the map of the kernel.
            lse: float32 [b h q], log-sum-exp of the rows.

        Returns:
            tuple: Index of the first query block, sums [b h n m] and live rows [b n].
        """
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
    """Sums of groups of `size` neighbours along an axis. The first group lacks its first `before` members."""
    if size == 1:
        return part
    after = -(before + part.shape[axis]) % size
    pad = (0, 0, before, after) if axis == 1 else (before, after)
    return torch.nn.functional.pad(part, pad).unflatten(axis, (-1, size)).sum(axis + 1)


def _folded(part: Tensor, axis: int, before: int) -> Tensor:
    """Add the blocks before the first token of a prompt to its first block."""
    if before <= 0:
        return part
    first, rest = part.tensor_split([before + 1], axis)
    return torch.cat([first.sum(axis, keepdim=True), rest], axis)


def _overlay(onto: Tensor, part: Tensor, row: int, key: int) -> None:
    """Write part[h n m] into onto[h N M] with its corner at (row, key), which may be outside of onto."""
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
    # rows that see no key have a log-sum-exp of -inf
    norm = tl.load(to.lse + (b * op.heads + h).to(tl.int64) * op.n_q + row, mask=inside, other=float("-inf")) * LOG2E
    tile = strip * TILES_PER_STRIP + tl.arange(0, TILES_PER_STRIP)
    there = (tile * BN + shift >= lo) & (tile * BN + shift < hi) & (tile < to.tiles)
    at = to.scratch + slot.to(tl.int64) * to.tiles * BM + tile[:, None] * BM + tl.arange(0, BM)[None, :]
    mask = there[:, None] & (norm > float("-inf"))[None, :]
    share = tl.where(mask, tl.exp2(tl.load(at, mask=mask, other=0.0) - norm[None, :]), 0.0)
    sums = tl.sum(tl.reshape(share, (TILES_PER_STRIP // KB, KB, BM // RB, RB)), 3)
    sums = tl.sum(sums, 1)
    block = start_row // RB + tl.arange(0, BM // RB)
    key_block = strip * (TILES_PER_STRIP // KB) + tl.arange(0, TILES_PER_STRIP // KB)
    line = (b * op.heads + h).to(tl.int64) * to.map_n + block
    there = (key_block < to.map_m)[:, None] & (block < to.map_n)[None, :]
    tl.store(to.map + line[None, :] * to.map_m + key_block[:, None], sums, mask=there)


def finish(
    op: Operands, to: Any, plan: BlockPlan, known: dict[str, Any], row_tiles: int, offset: int, count: int
) -> None:
    """Reduce the sums of tiles that programs of the forward pass stored to sums of blocks.

    Args:
        op: The operands of the call.
        to: The outputs of the forward pass, whose map is written.
        plan: The plan of the blocks.
        known: The compile-time flags of the call.
        row_tiles: Number of tiles of rows.
        offset: Index of the first program whose sums are stored.
        count: Number of programs whose sums are stored.
    """
    tiles = plan.tiling
    _finish[(count, ceil_div(to.tiles, TILES_PER_STRIP.value))](
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
