"""Cost of a steering bias in the kernel on a GPU: the same calls with and without it, in turns.

    python -m benchmarks.biases [--lengths 8192 32768 65536] [--turns 25]

Calls are bfloat16, causal, batch 1, with random data. A turn queues several calls, as a model does, so that the host is
ahead of the GPU. The turns are interleaved in random order, because the clock of a GPU varies by more than the cost of
a bias. The plain call is measured twice, and the difference of its two medians is the uncertainty of a ratio.
"""

import argparse
import math
import random
import statistics
from dataclasses import replace

import torch

from benchmarks.attention import SHAPES, machine
from interp.kernels.contract import Call
from interp.kernels.gpu import engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--turns", type=int, default=25, help="number of turns")
    arguments = parser.parse_args()
    print(f"{machine()}\n\n| tokens | width | call | ms | x plain |\n|---|---|---|---|---|")
    for heads, groups, width in SHAPES:
        for length in arguments.lengths:
            compare(heads, groups, width, length, arguments.turns)


def calls(heads: int, groups: int, width: int, length: int) -> dict[str, Call]:
    """Return a plain call and the same call with the biases of several edits."""
    torch.manual_seed(0)

    def made(h: int) -> torch.Tensor:
        return torch.randn(1, length, h, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    plain = Call(made(heads), made(groups), made(groups), width**-0.5)
    span, first = (torch.zeros(1, heads, length, device="cuda") for _ in range(2))
    span[:, ::3, 500 : length // 2 + 77] = math.log(0.01)
    first[:, :, 0] = 0.6
    rows = torch.randn(1, heads, length, 1, device="cuda") * 0.1
    sinks = torch.zeros(1, heads, length, dtype=torch.int32, device="cuda")
    sinks[:, :, torch.randint(0, length, (20,))] = 1
    return {
        "plain": plain,
        "span of a third of the heads (PASTA)": replace(plain, key_bias=span),
        "first key (ZeroTuning)": replace(plain, key_bias=first),
        "rows by 20 keys (ACT)": replace(plain, row_coef=rows, key_group=sinks),
        "a different bias for every key": replace(plain, key_bias=torch.randn_like(span)),
        "plain, again": plain,
    }


QUEUED = 20.0
"""Duration of the calls of a turn, in ms."""


def compare(heads: int, groups: int, width: int, length: int, turns: int) -> None:
    """Measure all calls of one shape and print a row of the table for each."""
    ways = calls(heads, groups, width, length)
    times: dict[str, list[float]] = {name: [] for name in ways}
    # the first calls compile; the last one gives the number of calls of a turn
    once = [timed(call, 1) for call in [*ways.values(), ways["plain"]]][-1]
    n = max(1, round(QUEUED / once))
    order = random.Random(0)
    for _ in range(turns):
        for name in order.sample(list(ways), len(ways)):
            times[name].append(timed(ways[name], n))
    base = statistics.median(times["plain"])
    for name, measured in times.items():
        ms = statistics.median(measured)
        print(f"| {length:,} | {width} | {name} | {ms:.3f} | {ms / base:.3f} |")


def timed(call: Call, n: int) -> float:
    """Return the time of one call in ms, from n consecutive calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(n):
        engine.attend(call)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / n


if __name__ == "__main__":
    main()
