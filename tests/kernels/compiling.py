"""Compiles the kernels for a GPU that is not present, with the tilings of the table, and prints their resource usage.

`python compiling.py 90 bfloat16 128` prints one line of JSON for each kernel. It runs as a separate process, because
Triton decides only once whether to use its interpreter. Each kernel is compiled from the arguments that its launcher
passes.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from interp.kernels import contract
from interp.kernels.contract import At, Blocks, Call, Columns, Entropy, Mass, TopKeys
from interp.kernels.gpu import (
    block_sums,
    columns,
    engine,
    few_rows,
    forward,
    gather,
    hopper,
    hopper_scores,
    key_sets,
    tile_sizes,
    top_keys,
)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
TYPES |= {torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


@dataclass
class CompiledKernel:
    """Stands in for a kernel and compiles it when it would be launched."""

    kernel: Any
    arch: int
    lines: list[dict[str, Any]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        signature, known, attributes = {}, {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            value = constants.get(name) if name in constants else args[i]
            if name in constants:
                signature[name], known[(i,)] = "constexpr", value
            else:
                signature[name] = typed(value, (i,), known, attributes)
        if repr((signature, known)) in self.done:
            return
        self.done.add(repr((signature, known)))
        kind = GluonASTSource if self.kernel.fn.__module__.endswith("hopper") else ASTSource
        source = kind(self.kernel, signature, known, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        registers, stack = resources(made.asm["cubin"])
        self.lines.append(
            {
                "kernel": self.kernel.fn.__name__.strip("_"),
                "flags": [name for name, value in constants.items() if value is True],
                "registers": registers,
                "stack": stack,
                "shared": made.metadata.shared,
                "wgmma": "wgmma.mma_async" in made.asm["ptx"],
            }
        )


def typed(value: Any, path: tuple[int, ...], known: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """Return the type name of an argument of a launch, and add its constants and attributes to the dictionaries."""
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [typed(x, (*path, i), known, attributes) for i, x in enumerate(value)]
        make: Any = type(value)
        return make(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or (isinstance(value, int) and value == 1):
        known[path] = value
        return "constexpr"
    if isinstance(value, HopperDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread and the bytes of its stack, which are spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    if used is None:
        raise RuntimeError(usage.stdout)
    return int(used[1]), int(used[2])


def compiled_kernels(arch: int) -> list[CompiledKernel]:
    """Replace each kernel that a module launches by a CompiledKernel; functions that kernels call stay."""
    made = []
    for module in (block_sums, columns, few_rows, forward, gather, hopper, hopper_scores, key_sets, top_keys):
        for name in sorted(set(re.findall(r"(\w+)\[\(", inspect.getsource(module)))):
            kernel = getattr(module, name, None)
            kernel = kernel.kernel if isinstance(kernel, CompiledKernel) else kernel
            if isinstance(kernel, triton.JITFunction):
                made.append(CompiledKernel(kernel, arch))
                setattr(module, name, made[-1])
    return made


def compile_all(arch: int, dtype: torch.dtype, width: int) -> list[dict[str, Any]]:
    """Compile all kernels for heads of one width, with and without scores."""
    tile_sizes.architecture = lambda device: arch
    tile_sizes.lookup_tiling.cache_clear()
    kernels = compiled_kernels(arch)
    n = 1024
    q, k = torch.zeros(1, 8, n, width, dtype=dtype), torch.zeros(1, 2, n, width, dtype=dtype)
    call = Call(q, k, k, width**-0.5)
    spread = torch.zeros(1, 16, n)
    listed = torch.zeros(1, n, 4, dtype=torch.int64)
    engine.attend(call)
    engine.attend(call, (Mass(spread), TopKeys(1), Entropy(), Columns(), At(listed)))
    engine.attend(call, (Mass(spread), TopKeys(1)))
    engine.attend(call, (Blocks(128, torch.zeros(1, dtype=torch.int64)),), out=False)
    engine.attend(call, (TopKeys(4),), out=False)
    one = contract.replace(call, q=q[:, :, :1], q_start=n - 1)
    engine.attend(one, (contract.Rows(torch.tensor([0])),))
    if arch == 90 and dtype.itemsize == 2 and width in (64, 128):
        tiles = tile_sizes.HOPPER_TILINGS[width]
        sets = torch.zeros(1, 1, n, 16)
        forward.forward(call, tiles=tiles)
        forward.forward(call, sets=sets, top=True, tiles=tiles)
        forward.forward(call, sets=sets, spans=True, top=True, entropy=True, tiles=tiles)
        cut = block_sums.BlockPlan.of(call, Blocks(128, torch.zeros(1, dtype=torch.int64)), tiles)
        forward.forward(call, sets=sets, spans=True, top=True, blocks=cut)
        biased = contract.replace(call, key_bias=torch.zeros(1, 8, n))
        forward.forward(biased, tiles=tiles)
        forward.forward(biased, sets=sets, spans=True, top=True, tiles=tiles)
        one_group = {"row_coef": torch.zeros(1, 8, n, 1), "key_group": torch.zeros(1, n, dtype=torch.int64)}
        forward.forward(contract.replace(call, **one_group), tiles=tiles)
        forward.forward(contract.replace(biased, **one_group), tiles=tiles)
    return [line for kernel in kernels for line in kernel.lines]


if __name__ == "__main__":
    for line in compile_all(int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])):
        print(json.dumps(line), flush=True)
