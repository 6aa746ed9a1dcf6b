"""Kinds of ablation of retrieval heads, and retrieval heads against induction heads: docs/dose.json.

    python -m benchmarks.dose [MODEL] [--folder runs/dose] [--n-random-sets 39]

The first ten retrieval heads are ablated under "zero", "mean" and "resample", or kept while all other retrieval heads
are ablated. `--part profile` draws random sets for each of these and for several numbers of heads. Finished points are
kept in the folder, so the same command continues where it stopped. The tables are those of docs/concepts/controls.md.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import interp
from interp import plots
from interp.analyses import identify
from interp.analyses.causal.ablated_measures import NEUTRAL, accuracy, neutral_loss
from interp.analyses.causal.ablation_test import ablation_test
from interp.analyses.causal.causal_profile import causal_profile
from interp.analyses.causal.set_difference import set_difference
from interp.analyses.prompt_sizes import PromptSizes
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trial import BASELINE
from interp.analyses.results.trials import Trials
from interp.analyses.tasks import standard

DOCS = Path(__file__).resolve().parents[1] / "docs"
SIZES = PromptSizes(check_length=176, reply_tokens=14)
"""as in a run, with shorter prompts and replies: an answer has at most 11 tokens"""
PARTS = ("test", "difference", "profile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--part", choices=PARTS, help="make one part; the profile takes an hour on two cores")
    parser.add_argument("--folder", type=Path, default=Path("runs/dose"), help="folder of finished points")
    parser.add_argument("--n-random-sets", type=int, default=39)
    parser.add_argument("--n-heads", type=int, default=10, help="top heads of each of the two tables")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10], help="numbers of retrieval heads")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    model, tokenizer = interp.load(arguments.model)
    scores = tables(model, tokenizer, folder)
    needles, repeated, neutral = standard.check_prompts(SIZES, tokenizer)
    reference = standard.check_needles(replace(SIZES, seed=standard.REFERENCE_SEED), tokenizer)[: standard.N_REFERENCE]
    shared: dict[str, Any] = {"n_random_sets": arguments.n_random_sets, "folder": folder, "progress": True}
    replies: dict[str, Any] = {"max_new_tokens": SIZES.reply_tokens, "batch_size": len(needles)}
    if arguments.part in (None, "test"):
        test = ablation_test(
            model, needles, scores["retrieval"], reference=reference, neutral=neutral, stop_early=False, **replies,
            **shared,
        )  # fmt: skip
        test.save(folder / "test")
    if arguments.part in (None, "difference"):
        difference = set_difference(
            model, scores["retrieval"], scores["induction"], needles=needles, repeated=repeated, neutral=neutral,
            n_heads=arguments.n_heads, **replies, **shared,
        )  # fmt: skip
        difference.save(folder / "difference")
    if arguments.part == "profile":
        measures = {"accuracy": accuracy(needles, **replies), NEUTRAL: neutral_loss(neutral)}
        about = [needles.fingerprint(), neutral.fingerprint(), SIZES.reply_tokens]
        found = causal_profile(
            model, scores["retrieval"], measures, sizes=arguments.sizes, about=about, reference=reference, **shared
        )
        replace(found, shares=("accuracy",)).save(folder / "profile")
    if all((folder / f"{name}.json").exists() for name in PARTS[:2]):
        write(arguments.model, scores, folder)


def write(model: str, scores: dict[str, HeadScores], folder: Path) -> None:
    """Write docs/dose.json, draw the profile if it was made, and print the tables."""
    found = {name: Trials.load(folder / name) for name in PARTS if (folder / f"{name}.json").exists()}
    agreement = scores["retrieval"].compare(scores["induction"], 10)
    print(f"Retrieval and induction: {agreement}")
    for trials in found.values():
        print("\n".join(["", *lines(trials)]))
    origin = found["test"].provenance
    record = {
        "model": model,
        "rows": {name: trials.rows() for name, trials in found.items()},
        "heads": {name: heads(trials) for name, trials in found.items()},
        "settings": {name: trials.settings for name, trials in found.items()},
        "provenance": None if origin is None else origin.to_dict(),
    }
    (DOCS / "dose.json").write_text(json.dumps(record, indent=1) + "\n")
    if "profile" in found:
        plots.save(plots.figure(found["profile"]), DOCS / "dose.svg", width=900)


def tables(model: Any, tokenizer: Any, folder: Path) -> dict[str, HeadScores]:
    """The scores of retrieval and induction, on the prompts of a run; stored in the folder."""
    makers = {
        "retrieval": lambda: identify.retrieval(model, standard.needles(SIZES, tokenizer)),
        "induction": lambda: identify.induction(model, standard.repeated()(SIZES, tokenizer)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, make in makers.items():
        path = folder / f"{name}.scores.json"
        if not path.exists():
            make().save(path)
        found[name] = HeadScores.load(path)
    return found


def heads(trials: Trials) -> dict[str, str]:
    """The heads of each tested condition, by its largest size."""
    return {name: str(trials.select(name, max(trials.sizes(name)))[0].heads) for name in trials.tested}


def lines(trials: Trials) -> list[str]:
    """A Markdown table: a row for each condition and size, a column for each measure with its test."""
    made = ["| condition | heads | " + " | ".join(trials.measures) + " |", "|---|---|" + "---|" * len(trials.measures)]
    for name in (BASELINE, *trials.tested):
        for size in trials.sizes(name):
            cells = [cell(trials, name, size, measure) for measure in trials.measures]
            made.append(f"| {name} | {size:g} | " + " | ".join(cells) + " |")
    return made


def cell(trials: Trials, name: str, size: float, measure: str) -> str:
    """A mean and the test against random sets."""
    mean = trials.mean(name, measure, size=size).mean
    shown = f"{mean:.0%}" if measure in trials.shares else f"{mean:.3f}"
    test = trials.set_test(name, measure, size=size)
    if test is None:
        return shown
    p = f"p = {test.p_value:.3f}" if test.decided else "no verdict"
    return f"{shown}, beyond {test.n_beyond} of {test.n_sets}, {p}"


if __name__ == "__main__":
    main()
