"""Test the leading heads of five analyses, and random heads in their place, against 99 matched random sets each.

    python -m benchmarks.head_sets [--sets 99] [--random 20] [--no-tests] [--out docs/head_sets.json]

The script uses the demo model with the prompts of `interp score`. It stores the numbers of each table (heads above the
threshold, how many of them are confident, the best score, the held-out score of the first place, the rank correlation
between halves of the prompts) and the tests; with `--no-tests` it only renews the tables in the file.

The draws do not end early for the leading heads, so that "beyond 99 of 99" can be reached. Then random heads take the
place of the leading ones: sets with as many heads of each layer, of which a test may call out one in twenty.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

import interp
from interp.analyses import registry
from interp.analyses.causal.ablation_test import ablation_test
from interp.analyses.causal.curve import causal_curve
from interp.analyses.prompt_sizes import PromptSizes
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trials import Trials
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts

ANALYSES = ("retrieval", "induction", "duplicate_token", "previous_token", "sinks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sets", type=int, default=99)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--analyses", default=",".join(ANALYSES))
    parser.add_argument("--out", default="docs/head_sets.json")
    parser.add_argument("--tests", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    model, tokenizer = interp.load(arguments.model, dtype="float32")
    sizes, out = PromptSizes(), Path(arguments.out)
    stored = json.loads(out.read_text()) if out.exists() and not arguments.tests else {"tests": []}
    stored |= {"model": arguments.model, "tables": []}
    rows = stored["tests"]
    for name in arguments.analyses.split(","):
        start = time.perf_counter()
        entry = registry.get(name)
        prompts = entry.prompts(sizes, tokenizer)
        scores: HeadScores = entry.thing(model, prompts, batch_size=16)
        stored["tables"].append(table(name, scores, entry.threshold))
        if not arguments.tests:
            continue
        check = entry.control.prompts(sizes, tokenizer) or prompts
        top = scores.heads(top=arguments.heads, above=0.0)
        found = experiment(entry.control, model, check, scores, arguments.sets, n_heads=len(top), stop_early=False)
        rows.append(row(name, "leading", found))
        show(rows[-1], start)
        called = 0
        for seed in range(arguments.random):
            start = time.perf_counter()
            found = experiment(entry.control, model, check, like(top, scores.layout, seed), arguments.sets, seed=seed)
            rows.append(row(name, f"random {seed}", found))
            called += rows[-1]["is_beyond"]
            show(rows[-1], start)
        print(f"{name}: {called} of {arguments.random} random sets called out", flush=True)
        out.write_text(json.dumps(stored, indent=1) + "\n")
    out.write_text(json.dumps(stored, indent=1) + "\n")


def like(heads: HeadSet, layout: HeadLayout, seed: int) -> HeadSet:
    """As many heads of each layer, drawn from all of its heads, as the control of these heads is drawn."""
    draw = random.Random(seed)
    return HeadSet(
        tuple(
            Head(layer, head)
            for layer, own in heads.by_layer().items()
            for head in draw.sample(range(layout.heads), len(own))
        )
    )


def experiment(
    control: Any,
    model: Any,
    prompts: Prompts,
    scores: HeadScores | HeadSet,
    n_sets: int,
    *,
    n_heads: int = 0,
    stop_early: bool = True,
    seed: int = 0,
) -> Trials:
    """The control of an analysis on the first heads of a table, or on a head set."""
    settings: Any = {"n_random_sets": n_sets, "stop_early": stop_early, "seed": seed}
    if control.measure == "accuracy":
        # the further conditions of the test are no part of its verdict
        settings |= {"kinds": (), "sufficiency": False, "depth": False, "n_prompts": control.n_used}
        return ablation_test(model, prompts, scores, n_heads=n_heads, batch_size=16, **settings)
    name, measure = control.measure_on(control.used(prompts), 16)
    ranking, size = (scores, n_heads) if isinstance(scores, HeadScores) else (list(scores), len(scores))
    return causal_curve(model, {"top": ranking}, {name: measure}, sizes=(size,), depth=False, **settings)


def table(name: str, scores: HeadScores, threshold: float) -> dict[str, Any]:
    """The numbers of a score table, and a line about them."""
    (first,) = scores.leading(1)
    found = {
        "analysis": name,
        "n_counted": scores.counted,
        "threshold": threshold,
        "n_above": len(scores.heads(above=threshold)),
        "n_confident": len(scores.confident(threshold)),
        "first": str(first.head),
        "score": first.value,
        "held_out": first.held_out,
        "split_half": scores.split_half,
    }
    print(
        ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
        )
    )
    return found


def row(name: str, kind: str, found: Trials) -> dict[str, Any]:
    """The numbers of a test."""
    condition = found.tested[0]
    test = found.set_test(condition)
    assert test is not None
    return {
        "analysis": name,
        "tested": kind,
        "measure": found.measures[0],
        "baseline": found.mean("baseline").mean,
        "value": found.mean(condition, size=max(found.sizes(condition))).mean,
        "difference": test.difference,
        "deviations": test.deviations,
        "n_beyond": test.n_beyond,
        "n_sets": test.n_sets,
        "p_value": test.p_value,
        "is_beyond": test.is_beyond,
    }


def show(found: dict[str, Any], start: float) -> None:
    print(
        f"{found['analysis']:16s} {found['tested']:10s} {found['measure'][:20]:20s} baseline {found['baseline']:6.2f} "
        f"ablated {found['value']:6.2f}  beyond {found['n_beyond']} of {found['n_sets']} (p = {found['p_value']:.3g}), "
        f"{found['deviations']:+.1f} sd  {time.perf_counter() - start:5.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
