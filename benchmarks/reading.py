"""What reading costs: time and memory of capture beside plain sdpa, eager transformers and a TransformerLens bridge.

    python -m benchmarks.reading [--lengths 1024 4096 8192] [--out docs/reading.md]

Each measurement runs in a process of its own, so that peaks do not mix (the kernel's own mark, Linux only). Times are
medians of whole forwards and their ratios to the plain forward of the same length, since machines differ.
A peer that would need more memory than is free is left out, and the table says so.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import interp
from interp.hooks import keep
from interp.hooks.capture import capture, run
from interp.hooks.prompts import Prompts

WAYS = {
    "sdpa, plain": "transformers as loaded, nothing read",
    "interp, idle": "inside a capture that keeps nothing",
    "interp, masses + argmax + entropy": "4 spans, top key and entropy of every query of every head",
    "interp, column means": "what each key receives",
    "interp, 16 last queries": "complete rows of the last 16 queries",
    "eager, all patterns": "transformers with output_attentions=True",
    "transformer-lens, pattern statistics": "its own bridge, hooks on every pattern that keep the same three",
}
PEERS = ("eager, all patterns", "transformer-lens, pattern statistics")
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--peer-limit", type=int, default=4096, help="longest prompt that n x n peers are given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), arguments.repeats)))
        return
    rows = []
    for length in arguments.lengths:
        plain = None
        for way in WAYS:
            if way in PEERS and length > arguments.peer_limit:
                rows.append({"way": way, "length": length, "skipped": f"above --peer-limit {arguments.peer_limit}"})
                print(line(rows[-1]), flush=True)
                continue
            command = [sys.executable, "-m", "benchmarks.reading", "--repeats", str(arguments.repeats)]
            done = subprocess.run([*command, "--one", way, str(length)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{way} at {length} failed: {done.stderr[-2000:]}")
            row = json.loads(done.stdout.splitlines()[-1])
            plain = row if way == "sdpa, plain" else plain
            rows.append(row | {"way": way, "length": length, "plain": plain})
            print(line(rows[-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(page(rows, arguments.repeats), encoding="utf-8")


def measure(way: str, length: int, repeats: int) -> dict[str, float | str]:
    """Seconds of a forward (median) and the peak of memory above the loaded model, in bytes."""
    model, _ = interp.load("demo", device="cpu", attn_implementation="eager" if "eager" in way else "sdpa")
    prompts = Prompts.from_ids(
        [torch.randint(10, 40_000, (length,), generator=torch.Generator().manual_seed(0)).tolist()]
    )
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    needed = 2 * 4 * heads * length**2 * (layers if "all patterns" in way else 2)
    if way in PEERS and needed > 0.8 * psutil.virtual_memory().available:
        return {"skipped": f"needs about {needed / 1e9:.0f} GB"}
    forward = forwards(way, model, prompts)
    # threads and caches warm up on a short prompt, so that the peak is that of the length asked for
    run(model, prompts.from_ids([list(range(10, 74))]), logits_to_keep=1)
    # 5 resets the high-water mark of resident memory
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmHWM")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        forward()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "peak": resident("VmHWM") - before}


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(row for row in text.splitlines() if row.startswith(field)).split()[1])


def forwards(way: str, model, prompts: Prompts):
    """The thing to time, as a function of nothing."""
    length = len(prompts[0])
    spans = [(0, 1), (1, length // 4), (length // 4, length // 2), (length // 2, length)]
    wanted = {
        "interp, idle": ([], {}),
        "interp, masses + argmax + entropy": ([keep.mass(*spans), keep.top_keys(1), keep.entropy()], {}),
        "interp, column means": ([keep.columns("mean")], {}),
        "interp, 16 last queries": ([keep.rows()], {"queries": slice(length - 16, None)}),
    }
    if way in wanted:
        kept, settings = wanted[way]

        def read() -> None:
            with capture(model, kept, prompts, **settings) as cap:
                run(model, prompts, logits_to_keep=1)
            for item in kept:
                cap[item]

        return read
    if way == "eager, all patterns":
        return lambda: run(model, prompts, logits_to_keep=1, output_attentions=True)
    if way == "sdpa, plain":
        return lambda: run(model, prompts, logits_to_keep=1)
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    bridge: Any = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    def statistics_of(pattern, hook):
        first = pattern[..., 0].clone()
        best = pattern.max(-1)
        entropy = torch.special.entr(pattern).sum(-1)
        kept.append((first, best.indices, best.values, entropy))

    hooks = [(f"blocks.{layer}.attn.hook_pattern", statistics_of) for layer in range(model.config.num_hidden_layers)]
    kept: list = []

    def hooked() -> None:
        kept.clear()
        with torch.no_grad():
            bridge.run_with_hooks(prompts.tensors()["input_ids"], fwd_hooks=hooks)

    return hooked


def line(row: dict) -> str:
    """One row of the table as text."""
    if "skipped" in row:
        return f"{row['length']:6d}  {row['way']:38s} left out: {row['skipped']}"
    ratio = row["seconds"] / row["plain"]["seconds"]
    above = (row["peak"] - row["plain"]["peak"]) / 1e6
    return f"{row['length']:6d}  {row['way']:38s} {row['seconds']:7.2f} s  {ratio:5.2f}x  {above:+8.0f} MB"


def page(rows: list[dict], repeats: int) -> str:
    """The table as a page of the docs."""
    from importlib.metadata import version

    model = "SmolLM2-135M-Instruct (30 layers, 9 heads, 270 in all; weights from 4 bit), float32, batch 1"
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, torch {version('torch')}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "transformer-lens"))
    out = [
        "# What reading costs",
        "",
        f"`python -m benchmarks.reading` on {model}; CPU {machine}, {versions}; medians of {repeats} forwards.",
        "Memory is the peak above that of the plain forward. The 270 patterns of 8,192 tokens alone would be 72 GB.",
        "",
        "| tokens | way | what | time, s | x plain | memory above plain, MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        what = WAYS[row["way"]]
        if "skipped" in row:
            out.append(f"| {row['length']:,} | {row['way']} | {what} | left out: {row['skipped']} | | |")
            continue
        ratio = row["seconds"] / row["plain"]["seconds"]
        above = (row["peak"] - row["plain"]["peak"]) / 1e6
        out.append(
            f"| {row['length']:,} | {row['way']} | {what} | {row['seconds']:.2f} | {ratio:.2f} | {above:+,.0f} |"
        )
    return "\n".join([*out, ""])


if __name__ == "__main__":
    main()
