"""A complete prefill on a GPU: a model of the shape of Llama-3.1-8B with random weights reads a long prompt.

    python -m benchmarks.prefill [--length 131072] [--layers 32] [--out docs/prefill.json]

The prefill runs the forward pass of the model, without reading and in a capture of two masses and the top key of every
query of every head. Then the script finds the longest prompt of eager attention, alone and with its patterns kept, and
the same for TransformerLens if it is installed.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention import machine
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, run

SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/prefill.json"))
    arguments = parser.parse_args()
    model = make(arguments.layers, arguments.length)
    found: dict[str, Any] = {
        "machine": machine(),
        "layers": arguments.layers,
        "heads": arguments.layers * SHAPE["num_attention_heads"],
        "length": arguments.length,
        "weights, bytes": torch.cuda.memory_allocated(),
    }
    prompts = made(arguments.length)
    kept = (keep.mass((0, 1), (1, arguments.length // 2)), keep.top_keys(1))

    def read() -> Any:
        with capture(model, kept, prompts) as cap:
            run(model, prompts, logits_to_keep=1)
        return cap

    ways: dict[str, Callable[[], Any]] = {
        "without reading": lambda: run(model, prompts, logits_to_keep=1),
        "reading 2 masses and the top key of every query of every head": read,
    }
    warm = made(4096)
    run(model, warm, logits_to_keep=1)
    with capture(model, (keep.mass((0, 1), (1, 2048)), keep.top_keys(1)), warm):
        run(model, warm, logits_to_keep=1)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way, go in ways.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            result = go()
            torch.cuda.synchronize()
            times[way].append(time.perf_counter() - start)
            found[way] = {"s": statistics.median(times[way]), "peak, bytes": torch.cuda.max_memory_allocated()}
            print(f"{way:64s} {times[way][-1]:7.2f} s, {found[way]['peak, bytes'] / 1e9:.1f} GB", flush=True)
            if way != "without reading":
                start = time.perf_counter()
                for item in kept:
                    result[item]
                found[way]["results put together, s"] = time.perf_counter() - start
                print(f"  results assembled in {found[way]['results put together, s']:.1f} s", flush=True)
            del result
    plain, reading = (found[way]["s"] for way in ways)
    print(f"time with reading / without: {reading / plain:.2f}", flush=True)
    for name, peer in (("eager", eager), ("TransformerLens", lens)):
        if name == "eager" or importlib.util.find_spec("transformer_lens"):
            found[name] = peer(model)
            print(name, found[name], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))


def make(layers: int, length: int) -> Any:
    """Create the model on the GPU in bfloat16 with seeded weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=length, **SHAPE)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def made(length: int) -> Prompts:
    """Return one prompt of random tokens."""
    rng = torch.Generator().manual_seed(0)
    return Prompts.from_ids([torch.randint(3, SHAPE["vocab_size"], (length,), generator=rng).tolist()])


def eager(model: Any) -> dict[str, int]:
    """Find the longest prompts of eager attention in transformers."""
    model.set_attn_implementation("eager")
    try:
        return {
            "forward alone": longest(lambda n: run(model, made(n), logits_to_keep=1)),
            "patterns kept": longest(lambda n: run(model, made(n), logits_to_keep=1, output_attentions=True)),
        }
    finally:
        model.set_attn_implementation("sdpa")


def lens(model: Any) -> dict[str, int]:
    """Find the longest prompts of the attention of TransformerLens. Its bridge changes the model permanently."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config, tokenizer=None)

    def tokens(length: int) -> torch.Tensor:
        return made(length).tensors()["input_ids"].cuda()

    def cached(length: int) -> Any:
        return bridge.run_with_cache(tokens(length), names_filter=lambda name: name.endswith("hook_pattern"))

    with torch.no_grad():
        return {
            "forward alone": longest(lambda n: bridge(tokens(n), return_type=None)),
            "patterns kept": longest(cached),
        }


def longest(go: Callable[[int], Any]) -> int:
    """Find the longest prompt, in powers of two, for which `go` fits into the memory of the GPU."""
    length, fits = 1024, 0
    try:
        while True:
            torch.cuda.empty_cache()
            go(length)
            fits, length = length, 2 * length
    except torch.cuda.OutOfMemoryError:
        return fits
    finally:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
