"""Key selectors for long contexts: rankings of heads, selectors compared with random keys, memory of the cache.

`python -m benchmarks.keys rankings|curve|draw|memory [MODEL]` writes results, tables and figures to docs/.
"""

import json
import time
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import interp
from interp import plots
from interp.analyses import identify, tasks
from interp.analyses.kv.compress_kv import CompressKV
from interp.analyses.kv.kv_curve import kv_curve
from interp.analyses.kv.kv_tasks import kv_tasks
from interp.analyses.kv.layer_errors import layer_errors
from interp.analyses.kv.selecting import selecting
from interp.analyses.kv.selectors_of import selectors_of
from interp.analyses.kv.streaming import Streaming
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trial import BASELINE, RANDOM
from interp.analyses.results.trials import Trials
from interp.hooks.edit.evicting_cache import EvictingCache, nbytes

DOCS = Path(__file__).resolve().parents[1] / "docs"
app = typer.Typer(add_completion=False)
Model = Annotated[str, typer.Argument(help="Hub name, folder or `demo`.")]
Steps = Annotated[int, typer.Option(help="Training steps of the gates of DuoAttention.")]
Folder = Annotated[Path, typer.Option(help="Folder of the score tables, which later calls reuse.")]


def tables(model: Any, tokenizer: Any, folder: Path, steps: int = 100) -> dict[str, HeadScores]:
    """Compute the scores for selectors and rankings, or load those in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = tasks.repeated(tokenizer, n=50, copies=4, batch=6)
    needles = tasks.needle(tokenizer, lengths=(320,), n=16)
    makers = {
        "retrieval": lambda: identify.retrieval(model, needles),
        "induction": lambda: identify.induction(model, tasks.repeated(tokenizer, n=50, batch=12)),
        "qrhead": lambda: identify.qrhead(model, *tasks.documents(tokenizer, n=8)),
        "semantic_retrieval": lambda: identify.semantic_retrieval(model, needles[:8]),
        "retrieval_reasoning": lambda: identify.retrieval_reasoning(model, needles[:8]),
        "razor_induction": lambda: identify.razor_induction(model, copies),
        "razor_echo": lambda: identify.razor_echo(model, copies),
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
    """Return the best head of each kv head, which is comparable to the gate of a kv head."""
    return HeadScores(scores.name, scores.by_group()[None], scores.unit)


@app.command()
def rankings(model: Model = "demo", folder: Folder = Path("runs/keys"), steps: Steps = 100) -> None:
    """Compare retrieval, induction, DuoAttention and QRHead by kv head: rank correlation, overlap, permutation p."""
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


@app.command()
def curve(
    model: Model = "demo", folder: Folder = Path("runs/keys"), n: int = 16, length: int = 400, steps: Steps = 100
) -> None:
    """Measure loss and accuracy by the share of kept keys, for every selector on three tasks."""
    loaded, tokenizer = interp.load(model, dtype="float32")
    scores = tables(loaded, tokenizer, folder, steps)
    made = selectors_of(scores, model=loaded)
    others = tasks.needle(tokenizer, lengths=(length,), n=8, seed=1_000_003)
    errors = layer_errors(loaded, others, CompressKV.from_scores(scores["semantic_retrieval"], 0.2))
    made["compress_kv by layer"] = partial(CompressKV.from_scores, scores["semantic_retrieval"], layer_weights=errors)
    # another seed than that of the prompts on which the heads were scored
    tasks_of_curve = kv_tasks(tokenizer, n=n, length=length, seed=3_000_017)
    kv_curve(loaded, tasks_of_curve, made, progress=True).save(DOCS / "keys.json")
    draw()


@app.command()
def draw() -> None:
    """Draw the figures and print the tables of the curve in docs/keys.json."""
    found = Trials.load(DOCS / "keys.json")
    ratios = found.sizes(RANDOM)
    n = len(ratios) * len(found.tested)
    lines = []
    for task in found.tasks:
        plots.save(plots.trials(found, "right", task), DOCS / f"keys-{task.replace(' ', '-')}.svg", width=900)
        right, loss = (found.mean(BASELINE, measure, task=task).mean for measure in ("right", "loss"))
        lines += ["", f"**{task}**: with every key {right:.0%} right, loss {loss:.2f}", ""]
        lines += ["| selector | " + " | ".join(f"{ratio:.0%} kept" for ratio in ratios) + " |"]
        lines += ["|---" * (1 + len(ratios)) + "|"]
        for name in (RANDOM, *found.tested):
            cells = []
            for ratio in ratios:
                mean, low, high = found.mean(name, "right", size=ratio, task=task)
                gain = found.gain(name, "right", over=RANDOM, size=ratio, task=task, n_comparisons=n)
                sign = "+" if gain.low > 0 else "−" if gain.high < 0 else ""
                lost = found.mean(name, "loss", size=ratio, task=task).mean
                cells.append(f"{mean:.0%}{sign} [{low:.0%}, {high:.0%}], {lost:.2f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    typer.echo("\n".join(lines))


@app.command()
def memory(
    model: Model = "demo",
    folder: Folder = Path("runs/keys"),
    length: int = 8192,
    keep_ratio: float = 0.25,
    new: Annotated[tuple[int, int], typer.Option(help="Numbers of new tokens of two replies.")] = (16, 512),
) -> None:
    """Measure the bytes of the cache after generate(), whole and compact, and the memory of the process or the GPU."""
    from transformers import DynamicCache

    found = interp.load(model)
    loaded: Any = found.model
    gates = folder / "duo_gates.scores.json"
    made = selectors_of({"duo_gates": HeadScores.load(gates)} if gates.exists() else {})
    kept = {name: make(keep_ratio) for name, make in made.items() if name in ("streaming", "snapkv", "duo_attention")}
    rows = []
    for tokens in new:
        prompts = tasks.passages(found.tokenizer, n=1, length=length - tokens)
        whole = None
        for name, selector in {"every key": Streaming(1.0), **kept}.items():
            cache = DynamicCache(config=loaded.config) if selector.is_noop else EvictingCache(loaded)
            before = _memory_in_use(loaded)
            started = time.perf_counter()
            with selecting(loaded, selector, prompts, None if selector.is_noop else cache):
                inputs = prompts.tensors(device=loaded.device)
                loaded.generate(
                    **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, past_key_values=cache
                )
            seconds, size, grown = time.perf_counter() - started, nbytes(cache), _memory_in_use(loaded) - before
            whole = whole or size
            rows.append({"selector": name, "new": tokens, "bytes": size, "grown": grown, "seconds": seconds})
            totals = f"{grown / 1e6:8.1f} MB in total, {size / whole:.3f} of the whole cache, {seconds:.1f} s"
            typer.echo(f"{name:14s} {tokens:5d} new {size / 1e6:8.1f} MB cache, {totals}")
            del cache
    settings = {"model": model, "length": length, "keep_ratio": keep_ratio, "device": str(loaded.device)}
    (DOCS / "keys-memory.json").write_text(json.dumps(settings | {"rows": rows}, indent=1))


def _memory_in_use(model: Any) -> int:
    """Return the memory in use, of the GPU or of the process."""
    import gc

    import psutil

    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    app()
