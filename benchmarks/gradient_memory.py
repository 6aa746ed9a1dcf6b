"""Largest memory of the gradient methods and of a sweep, with the layers stored and computed again, and the estimate.

    python -m benchmarks.gradient_memory [--device cuda --scale 8b --length 32768] [--methods duo_gates] [--plain]

The model has the shape of Llama 3.1 8B with random weights ("8b"), or a small one ("small"). On a GPU the allocator of
torch counts the largest memory. On a CPU every tensor that an operation makes is counted until it is freed. Weights are
left out. `--plain` runs each method with all layers stored as well, and compares the numbers.
"""

import argparse
import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.attention import machine
from interp.analyses import memory
from interp.analyses.causal.batched_interventions import BatchedInterventions
from interp.analyses.identify.duo_gates import duo_gates
from interp.analyses.identify.gradient_importance import gradient_importance
from interp.hooks.edit.ablation import Intervention
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts

SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
LARGE: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 500000.0,
}  # fmt: skip
SHAPES = {"small": SMALL, "8b": LARGE}


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make inside the context, until each is freed; CPU only."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(torch.Tensor, lambda x: self._add(x, 0), (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda x: self._add(x, 1), out)
        return out

    def _add(self, x: torch.Tensor, times: int) -> torch.Tensor:
        # views share a storage; one that comes from outside of the context counts nothing
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes() * times
        if key not in self._known:
            self._known[key] = weakref.finalize(storage, self._drop, key, size)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        return x

    def _drop(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.bytes -= size


def peak_bytes(work: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Run a function and return its result and the largest memory of the tensors that it makes."""
    if device.type != "cuda":
        with PeakMemory() as counter:
            result = work()
        return result, counter.peak
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def importance(model: Any, prompts: Prompts, checkpoint: bool) -> torch.Tensor:
    """Slopes of all heads."""
    return gradient_importance(model, prompts, normalize=None, batch_size=1, checkpoint=checkpoint).per_prompt


def gates(model: Any, prompts: Prompts, checkpoint: bool) -> torch.Tensor:
    """Gates after two steps."""
    return duo_gates(model, prompts, steps=2, span="tail", checkpoint=checkpoint).per_prompt


def sweep(model: Any, prompts: Prompts, checkpoint: bool) -> torch.Tensor:
    """Logits after the baseline pass of a sweep, and after one pass with the first head ablated."""
    reader = BatchedInterventions(model, prompts, Intervention("zero"))
    (seen,) = reader.under([HeadSet.parse("L0H0", HeadLayout.of(model))], rows=1)
    return seen.logits.cpu()


METHODS: dict[str, tuple[Callable[[Any, Prompts, bool], torch.Tensor], memory.MemoryModel]] = {
    "gradient_importance": (importance, memory.gradients),
    "duo_gates": (gates, memory.training),
    "sweep": (sweep, memory.reading),
}
"""function of a model, prompts and whether layers are computed again, and the estimate of its memory"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", default="small", choices=SHAPES)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, help="number of layers, by default that of the shape")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--plain", action="store_true", help="run with all layers stored too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model = make(arguments.scale, arguments.length, device, arguments.layers)
    rows = []
    for name in arguments.methods:
        work, _ = METHODS[name]
        # kernels are compiled before the first measurement
        work(model, made(min(256, arguments.length)), True)
        found = {}
        for checkpoint in (True, False) if arguments.plain and name != "sweep" else (True,):
            row, found[checkpoint] = measure(name, model, made(arguments.length), checkpoint)
            rows.append(row)
            print(
                f"{name:20s} {'layers computed again' if checkpoint else 'all layers stored':22s} "
                f"{row['peak, bytes'] / 1e9:8.3f} GB, estimate {row['estimate, bytes'] / 1e9:8.3f} GB, "
                f"{row['s']:7.2f} s",
                flush=True,
            )
        if len(found) > 1:
            difference = (found[True] - found[False]).abs().max() / found[False].abs().max()
            print(f"{name:20s} largest difference of the numbers: {difference:.1e} of the largest", flush=True)
    if arguments.out is not None:
        about = {"machine": machine(), "scale": arguments.scale, "length": arguments.length}
        arguments.out.write_text(
            json.dumps({**about, "layers": model.config.num_hidden_layers, "rows": rows}, indent=1)
        )


def measure(name: str, model: Any, prompts: Prompts, checkpoint: bool) -> tuple[dict[str, Any], torch.Tensor]:
    """The largest memory of a method, its estimate, its time, and its numbers."""
    work, estimate = METHODS[name]
    device = next(model.parameters()).device
    start = time.perf_counter()
    result, peak = peak_bytes(lambda: work(model, prompts, checkpoint), device)
    seconds = time.perf_counter() - start
    expected = estimate(memory.Shape.of(model), 1, max(prompts.lengths), {"checkpoint": checkpoint})
    row = {"method": name, "checkpoint": checkpoint, "peak, bytes": peak, "estimate, bytes": expected, "s": seconds}
    return row, result


def make(scale: str, length: int, device: torch.device, layers: int | None = None) -> Any:
    """A model with random weights, in bfloat16 on a GPU and in float32 elsewhere."""
    import transformers

    sizes: dict[str, Any] = {**SHAPES[scale], "max_position_embeddings": max(2048, length)}
    if layers:
        sizes["num_hidden_layers"] = layers
    config = transformers.LlamaConfig(**sizes)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def made(length: int) -> Prompts:
    """One prompt of random tokens, whose last 32 are the span "tail"."""
    ids = torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    return Prompts.from_ids([ids], spans=[{"tail": (length - 32, length)}])


if __name__ == "__main__":
    main()
