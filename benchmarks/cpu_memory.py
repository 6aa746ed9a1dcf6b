"""Memory of a reading of all queries on a CPU, by length.

    python -m benchmarks.cpu_memory [--lengths 50000 100000 200000] [--out docs/cpu_memory.json]

A process for each reduction and length computes one attention call of two heads, and reports the largest memory of the
process beyond what it had before the call. The reference is the size of the results.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REDUCTIONS = ("mass", "top_keys", "entropy", "columns", "blocks")
LENGTHS = (50_000, 100_000, 200_000)
HEADS, SIZE, BLOCK = 2, 16, 64


def measured(reduction: str, n: int) -> dict[str, float]:
    """Bytes beyond those before the call, bytes of the results, and seconds, in a process of its own.

    Args:
        reduction: One of `REDUCTIONS`.
        n: Number of tokens.
    """
    command = [sys.executable, "-m", "benchmarks.cpu_memory", "--one", reduction, "--lengths", str(n)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(reduction: str, n: int) -> dict[str, float]:
    import resource

    import torch

    from interp.kernels import chunked
    from interp.kernels.contract import Blocks, Call, Columns, Entropy, Mass, TopKeys

    torch.manual_seed(0)
    q, k = torch.randn(1, HEADS, n, SIZE), torch.randn(1, 1, n, SIZE)
    some = torch.zeros(1, 1, n, dtype=torch.bool)
    some[..., :10] = True
    request: Any = {
        "mass": Mass(some), "top_keys": TopKeys(4), "entropy": Entropy(), "columns": Columns(),
        "blocks": Blocks(BLOCK, torch.zeros(1, dtype=torch.long)),
    }[reduction]  # fmt: skip

    def held() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    with torch.no_grad():
        # the first call loads libraries
        chunked.attend(Call(q[:, :, :256], k[:, :, :256], k[:, :, :256], scale=0.25), ())
        before, start = held(), time.perf_counter()
        result = chunked.attend(Call(q, k, k, scale=0.25), (request,))
    values = result.values[0] if isinstance(result.values[0], tuple) else (result.values[0],)
    tensors = [result.out, *values]
    size = sum(x.untyped_storage().nbytes() for x in tensors if isinstance(x, torch.Tensor))
    return {"extra": held() - before, "results": size, "seconds": time.perf_counter() - start}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--reductions", nargs="+", choices=REDUCTIONS, default=REDUCTIONS)
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--one", choices=REDUCTIONS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_measure(given.one, given.lengths[0])))
        return
    print("| reduction | tokens | results, MB | other memory, MB | seconds |\n|---|---|---|---|---|")
    found: dict[str, Any] = {}
    for reduction in given.reductions:
        for n in given.lengths:
            row = found.setdefault(reduction, {})[str(n)] = measured(reduction, n)
            other = max(0.0, row["extra"] - row["results"])
            cells = (f"{row['results'] / 1e6:.0f}", f"{other / 1e6:.0f}", f"{row['seconds']:.0f}")
            print(f"| {reduction} | {n:,} | {' | '.join(cells)} |", flush=True)
    if given.out:
        import torch

        about = {"torch": torch.__version__, "python": platform.python_version(), "heads": HEADS, "head_dim": SIZE}
        Path(given.out).write_text(json.dumps({"about": about, "bytes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
