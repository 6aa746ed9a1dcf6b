"""Compiles every kernel for GPUs that are not present and checks spilled registers, shared memory and matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interp.kernels.gpu.tile_sizes import SHARED_MEMORY_BYTES

CASES_16_BIT = [(arch, "bfloat16", width) for arch in SHARED_MEMORY_BYTES for width in (64, 128, 256)]
CASES_FLOAT32 = [(arch, "float32", width) for arch in SHARED_MEMORY_BYTES for width in (64, 128)] + [
    (89, "float32", 256)
]
HOPPER_WARPS = 12
"""Warps of a program of the kernel for Hopper: two groups of 64 rows, and one that loads."""
QUICK_CASES = [(90, "bfloat16", 64), (90, "bfloat16", 128)]
"""All other cases are slow."""

MAX_SPILLED_BYTES = {("float32", 64): 16, ("float32", 128): 64, ("float32", 256): 4200}
"""Known bytes of stack. float32 takes three passes of the matrix units, whose operands are in registers; 16-bit inputs
spill nothing, except in the kernel for Hopper."""
MAX_HOPPER_SPILLED_BYTES = {("BIASED", 64): 440, ("BIASED", 128): 712, ("MAP", 64): 0, ("MAP", 128): 40}
"""Known bytes of stack of that kernel with biases, most if biases of keys and of rows are combined, and with sums of
tiles."""


def compiled(arch: int, dtype: str, width: int) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).parent / "compiling.py"), str(arch), dtype, str(width)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


CASES = [
    pytest.param(*case, marks=[] if case in QUICK_CASES else pytest.mark.slow) for case in CASES_16_BIT + CASES_FLOAT32
]


@pytest.mark.interpreter
@pytest.mark.parametrize(("arch", "dtype", "width"), CASES)
def test_kernels_fit(arch, dtype, width):
    kernels = compiled(arch, dtype, width)
    names = {line["kernel"] for line in kernels}
    assert {"forward", "finish", "columns", "winners", "at", "shares", "merge"} <= names
    for line in kernels:
        assert line["shared"] <= SHARED_MEMORY_BYTES[arch], line
        extra = [
            MAX_HOPPER_SPILLED_BYTES[flag, width]
            for flag in line["flags"]
            if line["kernel"] == "hopper" and (flag, width) in MAX_HOPPER_SPILLED_BYTES
        ]
        assert line["stack"] <= max(extra, default=MAX_SPILLED_BYTES.get((dtype, width), 0)), line
        if line["kernel"] == "hopper" and "MAP" in line["flags"]:
            # its scratch memory belongs to a multiprocessor, so two programs must not fit on one
            assert 2 * line["registers"] * 32 * HOPPER_WARPS > 65536, line
        if arch == 90 and dtype == "bfloat16" and line["kernel"] in ("forward", "columns", "hopper"):
            assert line["wgmma"], line
    assert ("hopper" in names) == ((arch, dtype) == (90, "bfloat16") and width < 256)
