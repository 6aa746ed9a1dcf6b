"""Every kernel, compiled for GPUs that are not there: what it spills, the shared memory it takes, the units it uses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interp.kernels.settings import SHARED

HALVES = [(arch, "bfloat16", width) for arch in SHARED for width in (64, 128, 256)]
SINGLES = [(arch, "float32", width) for arch in SHARED for width in (64, 128)] + [(89, "float32", 256)]
QUICK = [(90, "bfloat16", 64), (90, "bfloat16", 128)]
"""the rest is slow"""

SPILLED = {
    ("bfloat16", 64): 16,
    ("bfloat16", 128): 16,
    ("bfloat16", 256): 136,
    ("float32", 64): 256,
    ("float32", 128): 1600,
    ("float32", 256): 9000,
}
"""bytes of stack that are known of; float32 takes three passes of the matrix units, and their operands in registers"""


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
        assert line["stack"] <= SPILLED[dtype, width], line
        if arch == 90 and dtype == "bfloat16" and line["kernel"] in ("forward", "columns", "hopper"):
            assert line["wgmma"], line
    assert ("hopper" in names) == ((arch, dtype) == (90, "bfloat16") and width < 256)
