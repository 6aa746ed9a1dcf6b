"""Tile sizes by architecture, head width and dtype.

A table that was measured once, and no tuning on the spot: results are equal to the bit between runs.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["forward", "masses", "columns", "rows"]

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""bytes of shared memory that one program may have"""


@dataclass(frozen=True)
class Tiling:
    """Rows and keys of a tile, warps of a program, stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int
    precision: str = "ieee"
    """of float32 products: three passes of the matrix units, or as they come"""
    groups: int = 0
    """groups of warps that own 64 rows each, where `hopper.py` serves the call"""
    descriptors: bool = False
    """whether tiles are loaded by the copy engine of Hopper"""


HALF: dict[Kind, dict[int, dict[int, tuple[int, int, int, int]]]] = {
    "forward": {
        80: {64: (64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
        89: {64: (64, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 16, 8, 2)},
        90: {64: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (128, 64, 8, 2)},
        120: {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
    },
    "columns": {
        80: {64: (64, 128, 4, 3), 128: (64, 128, 4, 3), 256: (64, 64, 4, 2)},
        89: {64: (64, 128, 4, 3), 128: (64, 64, 4, 2), 256: (32, 64, 4, 2)},
        90: {64: (64, 128, 4, 3), 128: (64, 128, 8, 3), 256: (64, 128, 8, 2)},
        120: {64: (64, 128, 4, 3), 128: (64, 64, 4, 2), 256: (32, 64, 4, 2)},
    },
    "rows": {
        80: {64: (16, 64, 4, 3), 128: (16, 64, 4, 3), 256: (16, 64, 4, 2)},
        89: {64: (16, 64, 4, 3), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)},
        90: {64: (16, 128, 4, 3), 128: (16, 128, 4, 3), 256: (16, 64, 4, 2)},
        120: {64: (16, 64, 4, 3), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)},
    },
}
"""(rows, keys, warps, stages) by kind, architecture and padded head width, for 16-bit inputs"""
HALF["masses"] = HALF["forward"] | {
    80: HALF["forward"][89],
    90: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
}

SINGLE: dict[Kind, dict[int, tuple[int, int, int, int]]] = {
    "forward": {64: (64, 16, 4, 2), 128: (32, 16, 8, 2), 256: (16, 32, 8, 1)},
    "masses": {64: (64, 16, 4, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 1)},
    "columns": {64: (32, 64, 4, 2), 128: (16, 32, 4, 2), 256: (16, 32, 8, 1)},
    "rows": {64: (16, 64, 4, 2), 128: (16, 32, 4, 2), 256: (16, 32, 8, 1)},
}
"""the same for float32, on every architecture"""


def pieces(n: int, size: int) -> int:
    """How many parts of `size` hold n; triton.cdiv is a function for kernels, which takes the host microseconds."""
    return -(-n // size)


def power(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def architecture(device: torch.device) -> int:
    """The column of the table that serves a device; a CPU, which interprets, is taken for a Hopper."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    number = 10 * major + minor
    return max((known for known in SHARED if known <= number), default=80)


def tiling(kind: Kind, x: Tensor, *widths: int) -> Tiling:
    """The tiling of a kernel for tensors like x (its device and dtype), heads padded to the widest of `widths`.

    kind: "forward", "masses" (the same with key sets), "columns" or "rows"; widths: powers of two up to 256. A device
    that is newer than the table takes the newest column that it can run.
    Cannot show: the fastest tiling for short calls, which the table was not measured on.
    """
    return table(kind, architecture(x.device), x.element_size(), max(64, *widths))


@lru_cache
def table(kind: Kind, arch: int, itemsize: int, width: int) -> Tiling:
    if itemsize > 2:
        return Tiling(*SINGLE[kind][width], precision="tf32x3")
    return Tiling(*HALF[kind][arch][width], descriptors=kind != "rows" and arch == 90)
