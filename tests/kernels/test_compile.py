"""Every kernel, compiled for GPUs that are not there: what it spills, the shared memory it takes, the units it uses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interp.kernels.gpu.tile_sizes import SHARED

HALVES = [(arch, "bfloat16", width) for arch in SHARED for width in (64, 128, 256)]
SINGLES = [(arch, "float32", width) for arch in SHARED for width in (64, 128)] + [(89, "float32", 256)]
WARPS = 12
"""of a program of Hopper's kernel: two groups of 64 rows, and the one that loads"""
QUICK = [(90, "bfloat16", 64), (90, "bfloat16", 128)]
"""the rest is slow"""

SPILLED = {("float32", 64): 16, ("float32", 128): 64, ("float32", 256): 4200}
"""bytes of stack that are known of: float32 takes three passes of the matrix units, whose operands lie in registers.
16-bit inputs spill nothing, but for Hopper's kernel:"""
HOPPER = {("BIASED", 64): 440, ("BIASED", 128): 712, ("MAP", 64): 0, ("MAP", 128): 40}
"""what it spills with biases, most where those of keys and of rows meet, and with sums of tiles"""


def compiled(arch: int, dtype: str, width: int) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).parent / "compiling.py"), str(arch), dtype, str(width)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in HALVES + SINGLES]


@pytest.mark.interpreter
@pytest.mark.parametrize(("arch", "dtype", "width"), CASES)
def test_kernels_fit(arch, dtype, width):
    kernels = compiled(arch, dtype, width)
    names = {line["kernel"] for line in kernels}
    assert {"forward", "finish", "columns", "winners", "at", "shares", "merge"} <= names
    for line in kernels:
        assert line["shared"] <= SHARED[arch], line
        extra = [
            HOPPER[flag, width] for flag in line["flags"] if line["kernel"] == "hopper" and (flag, width) in HOPPER
        ]
        assert line["stack"] <= max(extra, default=SPILLED.get((dtype, width), 0)), line
        if line["kernel"] == "hopper" and "MAP" in line["flags"]:
            # its memory is that of a multiprocessor: two programs must not fit on one
            assert 2 * line["registers"] * 32 * WARPS > 65536, line
        if arch == 90 and dtype == "bfloat16" and line["kernel"] in ("forward", "columns", "hopper"):
            assert line["wgmma"], line
    assert ("hopper" in names) == ((arch, dtype) == (90, "bfloat16") and width < 256)
