"""Tile sizes by architecture, head width and dtype.

The table was measured once. Nothing is tuned at run time, so results are bit-identical between runs.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

KernelKind = Literal["forward", "masses", "columns", "rows"]
"""Kinds of kernel that have tilings in the table."""

SHARED_MEMORY_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may use on each architecture, in bytes."""


@dataclass(frozen=True)
class Tiling:
    """Size of the tiles of a kernel, and its launch options."""

    rows: int
    """Rows of a tile."""
    keys: int
    """Keys of a tile."""
    warps: int
    """Warps of a program."""
    stages: int
    """Stages of the software pipeline."""
    precision: str = "ieee"
    """Precision of matrix products: "tf32x3" for float32 inputs (three passes of the matrix units), else "ieee"."""
    groups: int = 0
    """Number of warp groups with 64 rows each if `hopper.py` serves the call, otherwise 0."""
    descriptors: bool = False
    """Whether the copy engine of Hopper loads the tiles."""


TILINGS_16_BIT: dict[KernelKind, dict[int, dict[int, tuple[int, int, int, int]]]] = {
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
"""(rows, keys, warps, stages) by kind, architecture and padded head width, for 16-bit inputs."""
TILINGS_16_BIT["masses"] = TILINGS_16_BIT["forward"] | {
    80: TILINGS_16_BIT["forward"][89],
    90: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
}

TILINGS_FLOAT32: dict[KernelKind, dict[int, tuple[int, int, int, int]]] = {
    "forward": {64: (64, 16, 4, 2), 128: (32, 16, 8, 2), 256: (16, 32, 8, 1)},
    "masses": {64: (64, 16, 4, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 1)},
    "columns": {64: (32, 64, 4, 2), 128: (16, 32, 4, 2), 256: (16, 32, 8, 1)},
    "rows": {64: (16, 64, 4, 2), 128: (16, 32, 4, 2), 256: (16, 32, 8, 1)},
}
"""(rows, keys, warps, stages) by kind and padded head width, for float32 on every architecture."""

HOPPER_TILINGS = {
    64: Tiling(128, 128, 4, 3, groups=2, descriptors=True),
    128: Tiling(128, 128, 4, 2, groups=2, descriptors=True),
}
"""Tilings of `hopper.py` by head width."""


def ceil_div(n: int, size: int) -> int:
    """Divide and round up. triton.cdiv is meant for kernels and takes microseconds on the host.

    Args:
        n: The dividend, 0 or more.
        size: The divisor, 1 or more.

    Returns:
        int: The number of parts of `size` that cover n.
    """
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n.

    Args:
        n: An integer, 1 or more.

    Returns:
        int: The power of two.
    """
    return 1 << (n - 1).bit_length()


def architecture(device: torch.device) -> int:
    """Return the architecture whose tilings a device uses.

    Args:
        device: The device. A CPU, which runs the interpreter, counts as Hopper.

    Returns:
        int: The newest known architecture that the device can run, such as 90.
    """
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    number = 10 * major + minor
    return max((known for known in SHARED_MEMORY_BYTES if known <= number), default=80)


def tiling(kind: KernelKind, x: Tensor, *widths: int) -> Tiling:
    """Return the tiling of a kernel.

    A device that is newer than the table uses the newest architecture that it can run.

    Args:
        kind: "forward", "masses" (forward with key sets), "columns" or "rows".
        x: A tensor with the device and dtype of the inputs.
        widths: Padded head widths, powers of two up to 256. The largest one counts.

    Returns:
        Tiling: The tiling.

    Limits:
        The table was not measured on short calls, for which another tiling may be faster.
    """
    return lookup_tiling(kind, architecture(x.device), x.element_size(), max(64, *widths))


@lru_cache
def lookup_tiling(kind: KernelKind, arch: int, itemsize: int, width: int) -> Tiling:
    """Look up a tiling in the tables.

    Args:
        kind: Kind of kernel.
        arch: A key of SHARED_MEMORY_BYTES.
        itemsize: Bytes of an element of the inputs.
        width: Padded head width: 64, 128 or 256.

    Returns:
        Tiling: The tiling.
    """
    if itemsize > 2:
        return Tiling(*TILINGS_FLOAT32[kind][width], precision="tf32x3")
    return Tiling(*TILINGS_16_BIT[kind][arch][width], descriptors=kind != "rows" and arch == 90)
