"""Cost of scores on a GPU: the kernels compared with PyTorch flash, cuDNN, FlexAttention and eager attention.

    python -m benchmarks.attention [--lengths 4096 ... 131072] [--out docs/attention.json]
    python -m benchmarks.attention --page docs/attention.json    # the table and the plot, on any machine

Calls are bfloat16, causal, batch 1, with random data. Times are medians of repeated calls between device events. Peers
are measured in the same run, so compare ratios rather than times. The rows "ours" measure the whole engine of
interp, from the call to the values of the contract.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.kernels.contract import Blocks, Call, Columns, Entropy, Mass, Request, Result, TopKeys
from interp.kernels.gpu import engine, few_rows

SHAPES = ((32, 8, 128), (9, 3, 64))
"""Query heads, kv heads and head width of each model."""
SETS = 16
CUDNN = "cuDNN"
OURS = "ours: "


@dataclass(frozen=True)
class Line:
    """One measurement of one method."""

    heads: int
    width: int
    length: int
    way: str
    ms: float | None
    tflops: float | None = None
    memory: int | None = None
    """Bytes at the peak in addition to the inputs."""
    results: int | None = None
    """Bytes of the output and the results."""
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--flex", type=int, nargs="*", default=[32768], help="lengths for FlexAttention")
    parser.add_argument("--out", type=Path, default=Path("docs/attention.json"))
    parser.add_argument(
        "--page", type=Path, help="JSON file of a finished run: write its table and plot to the same folder and exit"
    )
    arguments = parser.parse_args()
    if arguments.page:
        page(arguments.page)
        return
    lines: list[Line] = []
    for heads, groups, width in SHAPES:
        for length in arguments.lengths:
            lines += prefill(heads, groups, width, length, length in arguments.flex)
            store(lines, arguments.out)
    store(lines + decode(max(arguments.lengths)), arguments.out)


def store(lines: list[Line], path: Path) -> None:
    """Write the measurements so far, so that an interrupted run keeps them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "lines": [asdict(x) for x in lines]}, indent=1))


def machine() -> dict[str, str]:
    """Return the name of the GPU and the versions of the software."""
    import triton

    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
    }


def prefill(heads: int, groups: int, width: int, length: int, flex: bool) -> list[Line]:
    """Measure all methods at one length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def made(h: int) -> Tensor:
        # the layout of a projection, in which the heads of a token are adjacent
        return torch.randn(1, length, h, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    torch.manual_seed(0)
    q, k, v = made(heads), made(groups), made(groups)
    call = Call(q, k, v, width**-0.5)
    key = torch.arange(length, device="cuda")
    spans = one_hot((key * SETS // length + key // 5000) % SETS)
    scattered = one_hot(torch.randint(SETS, (length,), device="cuda"))
    first = torch.zeros(1, dtype=torch.int64, device="cuda")

    def peer(backend: Any) -> Callable[[], Any]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=True, enable_gqa=True)

        return run

    def ours(*requests: Request) -> Callable[[], Any]:
        return lambda: engine.attend(call, requests)

    read = (Mass(spans, spans=True), TopKeys(1))
    ways: dict[str, Callable[[], Any]] = {
        "PyTorch flash": peer(SDPBackend.FLASH_ATTENTION),
        CUDNN: peer(SDPBackend.CUDNN_ATTENTION),
        OURS + "output and log-sum-exp": ours(),
        OURS + "+ 16 masses on spans, argmax": ours(*read),
        OURS + "+ 16 masses on scattered keys, argmax": ours(Mass(scattered), TopKeys(1)),
        OURS + "+ 16 masses, argmax, entropy": ours(*read, Entropy()),
        OURS + "+ 16 masses, argmax, blocks of 128": ours(*read, Blocks(128, first)),
        OURS + "+ 16 masses, argmax, column sums": ours(*read, Columns()),
        OURS + "+ 16 masses, top 8 keys": ours(read[0], TopKeys(8)),
    }
    if flex:
        ways["FlexAttention"] = flexible(q, k, v)
    if 6 * heads * length**2 < 0.8 * torch.cuda.mem_get_info()[0]:
        ways["eager, with its pattern"] = lambda: eager(q, k, v)
    work = 4 * heads * width * length**2 / 2
    return [measured(heads, width, length, way, run, work) for way, run in ways.items()]


def one_hot(number: Tensor) -> Tensor:
    """Return one-hot sets [1 s k] from the number of the set of each key."""
    return torch.nn.functional.one_hot(number, SETS).T[None].bfloat16()


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Eager attention as in transformers: the pattern in the dtype of the model, its softmax in float32."""
    each = q.shape[1] // k.shape[1]
    score = q @ k.repeat_interleave(each, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu_(1)
    pattern = score.masked_fill_(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return pattern @ v.repeat_interleave(each, 1), pattern


def flexible(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """Return a function that runs compiled FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = q.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cuda")
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def decode(length: int) -> list[Line]:
    """Measure one row against a long cache: decoding without scores, and the kernel that returns the row."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    heads, groups, width = SHAPES[0]
    q = torch.randn(1, heads, 1, width, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, groups, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    call = Call(q, k, v, width**-0.5, q_start=length - 1)

    def peer(backend: Any) -> Callable[[], Any]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, enable_gqa=True)

        return run

    ways = {
        "decode: PyTorch flash": peer(SDPBackend.FLASH_ATTENTION),
        "decode: cuDNN": peer(SDPBackend.CUDNN_ATTENTION),
        OURS + "decode, no scores": lambda: few_rows.attend_few_rows(call, scores=None),
        OURS + "decode, its row returned": lambda: few_rows.attend_few_rows(call, scores="probs"),
    }
    return [measured(heads, width, length, way, run, 4 * heads * width * length) for way, run in ways.items()]


def measured(heads: int, width: int, length: int, way: str, run: Callable[[], Any], work: float) -> Line:
    """Measure the median time of repeated calls and the peak memory of one call."""
    from triton.testing import do_bench

    try:
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        memory, results = torch.cuda.max_memory_allocated() - before, result_bytes(kept)
        del kept
        ms = float(do_bench(run, warmup=25, rep=150 if length < 100_000 else 700, return_mode="median"))  # pyright: ignore[reportArgumentType]
        line = Line(heads, width, length, way, ms, work / ms / 1e9, memory, results)
    except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
        line = Line(heads, width, length, way, None, note=str(error).splitlines()[0][:80])
    took = "      failed" if line.ms is None else f"{line.ms:9.3f} ms {line.tflops:5.0f} TFLOP/s"
    print(f"{length:7,d} x {width:3d} {way:44s} {took} {line.note}", flush=True)
    return line


def result_bytes(result: Any) -> int:
    """Return the bytes of the tensors of a result."""
    if isinstance(result, Tensor):
        return result.nbytes
    if isinstance(result, Result):
        return result_bytes(result.out) + result_bytes(result.values)
    return sum(map(result_bytes, result)) if isinstance(result, tuple) else 0


def page(path: Path) -> None:
    """Write Markdown tables and an SVG figure to the folder of the run's file."""
    import plotly.graph_objects as go

    from interp import plots
    from interp.plots.style import LINES

    run = json.loads(path.read_text())
    lines = [Line(**line) for line in run["lines"]]
    versions = ", ".join(f"{name} {version}" for name, version in run["machine"].items() if name != "card")
    out = [
        "# Cost of scores on a GPU",
        "",
        f"`python -m benchmarks.attention` on one {run['machine']['card']}; {versions}.",
        "The calls are bfloat16, causal, batch 1, with random data; times are medians.",
        'The rows "ours" measure the whole engine of interp, with results in the form of the contract.',
    ]
    fig = go.Figure()
    for heads, width in dict.fromkeys((x.heads, x.width) for x in lines if "decode" not in x.way):
        out += ["", f"## {heads} query heads, head width {width}", "", *_table(lines, heads, width)]
        for i, way in enumerate(dict.fromkeys(x.way for x in lines if x.heads == heads and "decode" not in x.way)):
            own = [x for x in lines if (x.heads, x.way) == (heads, way) and x.ms]
            shown = {"dash": "solid" if way.startswith(OURS) else "dot", "color": LINES[i % len(LINES)]}
            name = f"{way} ({width})"
            fig.add_scatter(x=[x.length for x in own], y=[x.tflops for x in own], name=name, line=shown)
    single = [x for x in lines if "decode" in x.way and x.ms]
    if single:
        out += [
            "",
            "## One row against a long cache",
            "",
            "| method | ms | ratio to the fastest peer |",
            "|---|---|---|",
        ]
    best = min((x.ms for x in single if not x.way.startswith(OURS) and x.ms), default=1.0)
    out += [f"| {x.way} | {x.ms:.3f} | {(x.ms or 0) / best:.2f} |" for x in single]
    out += ["", f"![Useful TFLOP/s by length]({path.stem}.svg)"]
    path.with_suffix(".md").write_text("\n".join([*out, ""]))
    fig.update_layout(
        title="Attention with scores: useful TFLOP/s of q kᵀ and p v",
        xaxis={"type": "log", "title": "tokens"},
        yaxis={"title": "TFLOP/s", "rangemode": "tozero"},
        height=560,
    )
    plots.save(fig, path.with_suffix(".svg"), width=1000)


def _table(lines: list[Line], heads: int, width: int) -> list[str]:
    own = [x for x in lines if (x.heads, x.width) == (heads, width) and "decode" not in x.way]
    lengths = sorted({x.length for x in own})
    found = {(x.way, x.length): x for x in own}
    out = ["| method | " + " | ".join(f"{n:,}" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for way in dict.fromkeys(x.way for x in own):
        cells = []
        for n in lengths:
            line, base = found.get((way, n)), found.get((CUDNN, n))
            if line is None or line.ms is None:
                cells.append("")
                continue
            ratio = f" ({line.ms / base.ms:.2f}x)" if base is not None and base.ms else ""
            cells.append(f"{line.ms:.3f} ms{ratio}")
        out.append(f"| {way} | " + " | ".join(cells) + " |")
    longest = [x for x in own if x.length == lengths[-1] and x.memory and x.way.startswith(OURS)]
    pattern = 4 * heads * lengths[-1] ** 2
    if not longest:
        return [*out, "", "The ratios in parentheses are to cuDNN without scores."]
    out += ["", "The ratios in parentheses are to cuDNN without scores.", ""]
    out += [
        f"Memory at {lengths[-1]:,} tokens in addition to q, k and v. The pattern would take {pattern / 1e9:,.0f} GB:",
        "",
    ]
    out += ["| method | output and results, MB | additional memory at the peak, MB | share of the pattern |"]
    out += ["|---|---|---|---|"]
    for x in longest:
        extra = (x.memory or 0) - (x.results or 0)
        out.append(f"| {x.way} | {(x.results or 0) / 1e6:,.0f} | {extra / 1e6:,.0f} | {100 * extra / pattern:.4f} % |")
    return out


if __name__ == "__main__":
    main()
