"""Cost of reading: time and memory of capture compared with sdpa, eager attention and a TransformerLens bridge.

    python -m benchmarks.reading [--lengths 1024 4096 8192] [--out docs/reading.md]

Each method runs in a separate process, so that the peaks of memory do not mix. They come from the operating system, on
Linux only. In this process, forward passes of the method and plain ones take turns, with either one first, so that
changes in the speed of a shared machine cancel in the ratio. Times are medians, and ratios are medians over the turns.
A peer that would need more memory than is free is skipped, and the table shows this.
"""

import argparse
import json
import os
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
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, run

WAYS = {
    "sdpa, plain": "a plain forward pass of transformers, nothing read",
    "interp, idle": "inside a capture that keeps nothing",
    "interp, masses + argmax + entropy": "4 spans, top key and entropy of every query of every head",
    "interp, column means": "what each key receives",
    "interp, 16 last queries": "complete rows of the last 16 queries",
    "eager, all patterns": "transformers with output_attentions=True",
    "transformer-lens, pattern statistics": "its bridge; hooks keep the mass of one key, the top key and the entropy",
}
PLAIN = "sdpa, plain"
PEERS = ("eager, all patterns", "transformer-lens, pattern statistics")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument(
        "--turns", type=int, default=5, help="number of forward passes of each method, and of plain ones"
    )
    parser.add_argument("--peer-turns", type=int, default=2, help="the same number for the n x n peers, which are slow")
    parser.add_argument(
        "--long-turns", type=int, default=3, help="the same number for prompts longer than --peer-limit"
    )
    parser.add_argument("--peer-limit", type=int, default=4096, help="longest prompt for the n x n peers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), arguments.turns)))
        return
    rows = []
    for length in arguments.lengths:
        peak = 0.0
        # the peaks of the other methods are differences to that of the plain forward pass
        for way in (PLAIN, *(way for way in arguments.ways if way != PLAIN)):
            turns = arguments.turns if length <= arguments.peer_limit else arguments.long_turns
            if way in PEERS:
                turns = arguments.peer_turns
            row: dict[str, Any] = {"skipped": f"above --peer-limit {arguments.peer_limit}"}
            if way not in PEERS or length <= arguments.peer_limit:
                row = apart(way, length, turns)
            peak = row["peak"] if way == PLAIN else peak
            rows.append(row | {"way": way, "length": length, "turns": turns, "above": row.get("peak", 0) - peak})
            print(line(rows[-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(page(rows), encoding="utf-8")


def apart(way: str, length: int, turns: int) -> dict[str, Any]:
    """Return the result of `measure` from a separate process."""
    command = [sys.executable, "-m", "benchmarks.reading", "--turns", str(turns), "--one", way, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} at {length} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, length: int, turns: int) -> dict[str, float | str]:
    """Measure the seconds of a forward pass and of a plain one, their ratio (all medians) and the peak memory."""
    model, _ = interp.load("demo", device="cpu", attn_implementation="eager" if "eager" in way else "sdpa")
    prompts = Prompts.from_ids(
        [torch.randint(10, 40_000, (length,), generator=torch.Generator().manual_seed(0)).tolist()]
    )
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    needed = 2 * 4 * heads * length**2 * (layers if "all patterns" in way else 2)
    if way in PEERS and needed > 0.8 * psutil.virtual_memory().available:
        return {"skipped": f"needs about {needed / 1e9:.0f} GB"}
    # a peer changes its model
    other = interp.load("demo", device="cpu")[0] if way in PEERS else model
    plain = forwards(PLAIN, other, prompts)
    forward = plain if way == PLAIN else forwards(way, model, prompts)
    # warm up threads and caches on a short prompt, so that the peak is that of the long prompt
    run(model, prompts.from_ids([list(range(10, 74))]), logits_to_keep=1)
    # 5 resets the high-water mark of resident memory
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmHWM")
    forward()
    peak = resident("VmHWM") - before
    times: dict[Any, list[float]] = {forward: [], plain: []}
    for turn in range(turns):
        for one in list(times)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            one()
            times[one].append(time.perf_counter() - start)
    ratios = [seconds / base for seconds, base in zip(times[forward], times[plain], strict=True)]
    middle = statistics.median
    return {"seconds": middle(times[forward]), "plain": middle(times[plain]), "ratio": middle(ratios), "peak": peak}


def resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(row for row in text.splitlines() if row.startswith(field)).split()[1])


def forwards(way: str, model, prompts: Prompts):
    """Return the function to time, without arguments."""
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
    if way == PLAIN:
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


def line(row: dict[str, Any]) -> str:
    """Return one row of the table as text."""
    start = f"{row['length']:6d}  {row['way']:38s}"
    if "skipped" in row:
        return f"{start} skipped: {row['skipped']}"
    return f"{start} {row['seconds']:7.2f} s  {row['ratio']:5.2f}x  {row['above'] / 1e6:+8.0f} MB"


def page(rows: list[dict[str, Any]]) -> str:
    """Return the table as a page of the documentation."""
    from importlib.metadata import version

    model = "SmolLM2-135M-Instruct (30 layers of 9 heads, 270 heads in all; weights from 4 bit), float32, batch 1"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens"))
    policy = os.environ.get("OMP_WAIT_POLICY")
    waiting = f", `OMP_WAIT_POLICY={policy}`" if policy else ""
    out = [
        "# The cost of reading attention",
        "",
        f"`python -m benchmarks.reading` on {model}.",
        f"The machine has {psutil.cpu_count()} CPU cores ({platform.machine()}); {versions}{waiting}.",
        "Each way of reading runs in a separate process, where its forward passes alternate with plain ones.",
        "Times are medians, and ratios are medians over the turns.",
        "Memory is the peak of a forward pass above that of a plain one.",
        "",
        "| tokens | way | turns | time, s | plain, s | x plain | memory above plain, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['length']:,} | {row['way']} |"
        if "skipped" in row:
            out.append(f"{start} | skipped: {row['skipped']} | | | |")
            continue
        ratio, above = f"{row['ratio']:.2f}", f"{row['above'] / 1e6:+,.0f}"
        if row["way"] == PLAIN:
            ratio, above = "1.00", ""
        out.append(f"{start} {row['turns']} | {row['seconds']:.2f} | {row['plain']:.2f} | {ratio} | {above} |")
    notes = [f"- {way}: {description}" for way, description in WAYS.items()]
    patterns = "The patterns of 8,192 tokens alone would take 72 GB."
    return "\n".join([*out, "", *notes, "", "Compare ratios, not seconds, on a shared machine.", patterns, ""])


if __name__ == "__main__":
    main()
