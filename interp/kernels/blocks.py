"""Blocks of rows by blocks of keys, out of the tiles of the forward pass.

Blocks count from each prompt's first token. Tiles are moved so that none lies across the border of two blocks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from interp.kernels.contract import Blocks, Call, block_grid
from interp.kernels.settings import Tiling


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """How one request for blocks is served by the forward pass."""

    request: Blocks
    rows: int
    """rows of a block as the kernel adds them up: a block, or a tile where a block is larger"""
    row_shift: Tensor
    key_shift: Tensor
    """int32 [b] where the first tile of rows and the first block of keys begin, at or before 0"""
    tiling: Tiling

    @classmethod
    def of(cls, call: Call, request: Blocks, tiles: Tiling) -> "BlockPlan | None":
        """The plan, or None where tiles cannot be cut at the borders of blocks."""
        size = request.size
        if call.row_columns is not None or size & (size - 1) or not 16 <= size <= 1024:
            return None
        tiles = replace(tiles, keys=min(tiles.keys, size))
        rows = min(size, tiles.rows)
        first = request.first.to(call.q.device)
        row_shift = -torch.remainder(call.q_start - first, rows).to(torch.int32)
        key_shift = -torch.remainder(call.k_start - first, size).to(torch.int32)
        return cls(request, rows, row_shift, key_shift, tiles)

    def table(self, call: Call, table: Tensor, lse: Tensor) -> tuple[int, Tensor, Tensor]:
        """The contract's (start, sums [b h n m], live rows [b n]) from the kernel's table of blocks."""
        b, h = call.sizes[:2]
        size, first = self.request.size, self.request.first.to(call.q.device)
        start, n, m, row_block, _ = block_grid(call, self.request, None)
        sums = torch.zeros(b, h, n, m, dtype=table.dtype, device=table.device)
        row_from = torch.div(self.row_shift + call.q_start - first, self.rows, rounding_mode="floor").tolist()
        key_from = torch.div(self.key_shift + call.k_start - first, size, rounding_mode="floor").tolist()
        ratio = size // self.rows
        for i, (row, key) in enumerate(zip(row_from, key_from, strict=True)):
            before = row % ratio
            after = -(before + table.shape[2]) % ratio
            part = torch.nn.functional.pad(table[i], (0, 0, before, after))
            part = part.unflatten(1, (-1, ratio)).sum(2)
            _overlay(sums[i], part, row // ratio - start, key)
        live = (lse > -torch.inf).any(1).to(table.dtype)
        return start, sums, torch.zeros(b, n, dtype=table.dtype, device=table.device).scatter_add_(1, row_block, live)


def _overlay(onto: Tensor, part: Tensor, row: int, key: int) -> None:
    """Write part[h n m] into onto[h N M] with its corner at (row, key), which may lie outside."""
    n, m = onto.shape[1:]
    rows, keys = slice(max(row, 0), min(n, row + part.shape[1])), slice(max(key, 0), min(m, key + part.shape[2]))
    if rows.stop > rows.start and keys.stop > keys.start:
        onto[:, rows, keys] = part[:, rows.start - row : rows.stop - row, keys.start - key : keys.stop - key]
