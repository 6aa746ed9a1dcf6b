"""Which heads and keys a long context needs: rankings side by side, selectors against random keys, memory of the cache.

`python -m benchmarks.keys rankings|curve|draw|memory [MODEL]`; results go to docs/, tables and figures with them.
"""

import json
import time
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import interp
from interp import plots
from interp.analyses import identify, tasks
from interp.analyses.keys.base import selecting
from interp.analyses.keys.budgets import HeadKV, TaskKV
from interp.analyses.keys.compress import CompressKV
from interp.analyses.keys.duo import DuoAttention, RazorAttention
from interp.analyses.keys.evaluate import KeyCurve, asked, key_curve
from interp.analyses.keys.simple import RandomKeys, Streaming
from interp.analyses.keys.window import SnapKV
from interp.analyses.scores import HeadScores
from interp.hooks.compact import CompactCache, nbytes

DOCS = Path(__file__).resolve().parents[1] / "docs"
SHARES = (0.1, 0.2, 0.4, 0.7)
app = typer.Typer(add_completion=False)
Model = Annotated[str, typer.Argument(help="Hub name, folder or demo.")]
Steps = Annotated[int, typer.Option(help="Of the optimisation of DuoAttention's gates.")]
Folder = Annotated[Path, typer.Option(help="Where score tables are kept, and read again.")]


def tables(model: Any, tokenizer: Any, folder: Path, steps: int = 100) -> dict[str, HeadScores]:
    """The scores that selectors and rankings take, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = tasks.repeated(tokenizer, n=50, copies=4, batch=6)
    needles = tasks.needle(tokenizer, lengths=(320,), n=16)
    makers = {
        "retrieval": lambda: identify.retrieval(model, needles),
        "induction": lambda: identify.induction(model, tasks.repeated(tokenizer, n=50, batch=12)),
        "qrhead": lambda: identify.qrhead(model, *tasks.documents(tokenizer, n=8)),
        "semantic": lambda: identify.semantic(model, needles[:8]),
        "reasoning": lambda: identify.reasoning(model, needles[:8]),
        "razor_induction": lambda: identify.razor_induction(model, copies),
        "razor_echo": lambda: identify.razor_echo(model, copies),
        "task_kv": lambda: identify.task_kv(model, needles[:8]),
        "duo_gates": lambda: identify.duo_gates(
            model, tasks.passkeys(tokenizer, n=16, lengths=(512,)), steps=steps, sink=8, recent=64, lr=0.03,
            folder=folder / "duo", progress=True,
        ),
    }  # fmt: skip
    found = {}
    for name, make in makers.items():
        path = folder / f"{name}.scores.json"
        if not path.exists():
            started = time.perf_counter()
            make().save(path)
            typer.echo(f"{name}: {time.perf_counter() - started:.0f} s")
        found[name] = HeadScores.load(path)
    return found


def by_group(scores: HeadScores) -> HeadScores:
    """The best head of each kv head: what a gate of a kv head can be compared with."""
    best = scores.values.unflatten(1, (scores.layout.kv_heads, -1)).amax(-1)
    return HeadScores(scores.name, best[None], scores.unit)


@app.command()
def rankings(model: Model = "demo", folder: Folder = Path("runs/keys"), steps: Steps = 100) -> None:
    """Retrieval, induction, DuoAttention and QRHead by kv head: rank correlation, overlap, permutation p."""
    loaded, tokenizer = interp.load(model, dtype="float32")
    every = tables(loaded, tokenizer, folder, steps)
    chosen = {name: by_group(every[name]) for name in ("retrieval", "induction", "duo_gates", "qrhead")}
    rows = []
    for one, other in combinations(chosen, 2):
        agreed = chosen[one].compare(chosen[other], k=10)
        rows.append({"one": one, "other": other, **vars(agreed)})
        typer.echo(f"{one:10s} {other:10s} {agreed}")
    plots.save(plots.rankings(chosen), DOCS / "rankings.svg", width=1000)
    (DOCS / "rankings.json").write_text(json.dumps({"model": model, "rows": rows}, indent=1))


def selectors(scores: dict[str, HeadScores]) -> dict[str, Any]:
    """Each selector as a function of the share."""
    razor = scores["razor_induction"]
    return {
        "random": lambda share: RandomKeys(share),
        "StreamingLLM": lambda share: Streaming(share),
        "SnapKV": lambda share: SnapKV(share),
        "CompressKV": lambda share: CompressKV.of(scores["semantic"], share),
        "HeadKV-R2": lambda share: HeadKV.of(scores["reasoning"], share),
        "Task-KV": lambda share: TaskKV.of(scores["task_kv"], share),
        "DuoAttention": lambda share: DuoAttention.of(scores["duo_gates"], share),
        "RazorAttention": lambda share: RazorAttention.of(razor, share),
    }


@app.command()
def curve(
    model: Model = "demo", folder: Folder = Path("runs/keys"), n: int = 16, length: int = 400, steps: Steps = 100
) -> None:
    """Loss and accuracy against the kept share, eight selectors on three tasks."""
    loaded, tokenizer = interp.load(model, dtype="float32")
    made = selectors(tables(loaded, tokenizer, folder, steps))
    found = key_curve(loaded, asked(tokenizer, n=n, length=length), made, shares=SHARES, progress=True)
    (DOCS / "keys.json").write_text(json.dumps(found.to_dict()))
    draw()


@app.command()
def draw() -> None:
    """Figures and tables of the curve that docs/keys.json holds."""
    found = KeyCurve.from_dict(json.loads((DOCS / "keys.json").read_text()))
    names = list(dict.fromkeys(point.selector for point in found.points if point.selector != "whole"))
    lines = []
    for task in dict.fromkeys(point.task for point in found.points):
        plots.save(plots.key_curve(found, task, "right"), DOCS / f"keys-{task.replace(' ', '-')}.svg", width=900)
        whole, loss = (found.at("whole", 1.0, task, measure)[0] for measure in ("right", "loss"))
        lines += ["", f"**{task}**: with every key {whole:.0%} right, loss {loss:.2f}", ""]
        lines += ["| selector | " + " | ".join(f"{share:.0%} kept" for share in SHARES) + " |", "|---" * 5 + "|"]
        for name in names:
            cells = []
            for share in SHARES:
                mean, low, high = found.at(name, share, task)
                apart = found.gain(name, share, task)[1:] if name != "random" else (0.0, 0.0)
                sign = "+" if apart[0] > 0 else "−" if apart[1] < 0 else ""
                lost = found.at(name, share, task, "loss")[0]
                cells.append(f"{mean:.0%}{sign} [{low:.0%}, {high:.0%}], {lost:.2f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    typer.echo("\n".join(lines))


@app.command()
def memory(model: Model = "demo", length: int = 8192, share: float = 0.25, new: int = 16) -> None:
    """Bytes of the cache after generate(), whole and compact, and the memory of the process or of the GPU."""
    from transformers import DynamicCache

    found = interp.load(model)
    loaded: Any = found.model
    prompts = tasks.passages(found.tokenizer, n=1, length=length - new)
    rows = {}
    for name, kept in (("every key", 1.0), ("StreamingLLM", share), ("SnapKV", share)):
        cache = DynamicCache(config=loaded.config) if kept == 1 else CompactCache(loaded)
        selector = SnapKV(kept) if name == "SnapKV" else Streaming(kept)
        before = _held(loaded)
        started = time.perf_counter()
        with selecting(loaded, selector, prompts, None if kept == 1 else cache):
            inputs = {key: value.to(loaded.device) for key, value in prompts.tensors().items()}
            loaded.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, past_key_values=cache)
        rows[name] = {"bytes": nbytes(cache), "grown": _held(loaded) - before, "seconds": time.perf_counter() - started}
        cached, part = nbytes(cache) / 1e6, nbytes(cache) / rows["every key"]["bytes"]
        told = f"{rows[name]['grown'] / 1e6:8.1f} MB in all, {part:.3f} of every key, {rows[name]['seconds']:.1f} s"
        typer.echo(f"{name:14s} {cached:8.1f} MB cache, {told}")
        del cache
    settings = {"model": model, "length": length, "share": share, "new": new, "device": str(loaded.device)}
    (DOCS / "keys-memory.json").write_text(json.dumps(settings | {"rows": rows}, indent=1))


def _held(model: Any) -> int:
    """Memory in use: of the GPU, or of the process."""
    import gc

    import psutil

    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    app()
