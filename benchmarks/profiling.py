"""Cost and result of a profile in rounds, compared with an exhaustive profile and with the procedure of the paper.

    python -m benchmarks.profiling [--task json --items 16] [--generate] [--folder DIR]

The script makes two profiles of the heads of PASTA on the demo model with the same prompts: in rounds, and exhaustive,
with every head on every prompt. `--generate` adds the procedure of the paper on the same prompts: each head is steered
alone, and its greedy replies are judged. Many heads are rows of one batch, which does not change the replies. A
generation counts as one forward pass for its prompt and one for each new token.
"""

import argparse
from dataclasses import replace
from typing import Any

import torch

import interp
from interp import steer, tasks
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.edit.per_row_steering import steering_rows
from interp.hooks.generate import generate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts

PAPER = 1000
"""Number of prompts of a task in the paper."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--task", default="json")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--folder", help="folder that keeps finished parts between calls")
    arguments = parser.parse_args()
    loaded = interp.load(arguments.model)
    task = tasks.get(arguments.task)
    prompts = task.prompts(loaded.tokenizer, "profile", arguments.items)
    edit = steer.Pasta(task.span, arguments.alpha)
    layout = HeadLayout.of(loaded.model)
    settings: dict[str, Any] = {"folder": arguments.folder, "progress": True}
    rounds = steer.profile(loaded.model, prompts, edit, **settings)
    whole = steer.profile(loaded.model, prompts, edit, start=len(prompts), **settings)
    print(f"PASTA (alpha {arguments.alpha}) on {task.name}, {len(prompts)} prompts, {layout.size} heads")
    print_cost("in rounds", rounds.cost)
    print_cost("every head, every prompt", whole.cost)
    for k in (10, 25, 50):
        print(f"  top {k}: {len(rounds.heads(k) & whole.heads(k))} of {k} shared (chance {k * k / layout.size:.1f})")
    for n in (len(prompts), PAPER):
        paper = layout.size * n * (1 + task.max_new_tokens)
        print(f"  procedure of the paper on {n:,} prompts: up to {paper:,} forward passes, new tokens included")
    if arguments.generate:
        table, forwards = generated(loaded.model, prompts, edit, task)
        print(f"  by generation on the same prompts: {forwards:,.0f} forward passes")
        for k in (10, 25, 50):
            print(
                f"  top {k}: {shared(table, rounds, k)} shared with rounds, {shared(table, whole, k)} with exhaustive"
            )
            halves = [replace(table, per_prompt=table.per_prompt[i::2], labels=()) for i in range(2)]
            print(f"    two halves of its prompts share {halves[0].compare(halves[1], k).overlap} heads")


def print_cost(name: str, cost: dict[str, float]) -> None:
    """Print the cost of a profile."""
    print(
        f"  {name}: {cost['prompts']:,.0f} prompts read, equal to {cost['forwards']:,.0f} whole forward passes, and "
        f"{cost['continuations']:,.0f} short continuations"
    )


def shared(table: HeadScores, found: steer.Profile, k: int) -> str:
    """Count the heads of the top k of a profile that are in the top k by generation.

    Since replies tie, the count is a range: heads that certainly belong to the top k, and those that may.
    """
    values = table.values.flatten()
    edge = values.sort(descending=True).values[k - 1]
    chosen = found.heads(k)
    above = sum(table[head] > edge for head in chosen)
    tied = min(sum(table[head] == edge for head in chosen), k - int((values > edge).sum()))
    ties = int((values == edge).sum())
    return f"{above} to {above + tied} of {k} ({ties} heads tie for the last {k - int((values > edge).sum())} places)"


def generated(model: Any, prompts: Prompts, edit: Any, task: tasks.Task) -> tuple[HeadScores, float]:
    """Return the accuracy of replies with each head steered alone, and the number of forward passes."""
    layout = HeadLayout.of(model)
    right = torch.zeros(len(prompts), layout.layers, layout.heads)
    forwards = 0.0
    for number in range(len(prompts)):
        one = prompts[number : number + 1]
        for layer in range(layout.layers):
            sets = [HeadSet.parse(f"L{layer}H{head}") for head in range(layout.heads)]
            rows = Prompts(one.items * len(sets), prompts.tokenizer, prompts.pad_id)
            with steering_rows(model, edit, one, sets):
                replies = generate(model, rows, max_new_tokens=task.max_new_tokens, stop=task.stop)
            right[number, layer] = torch.tensor([float(task.judge(reply.text, one[0])) for reply in replies])
            forwards += sum(1 + len(reply.ids) for reply in replies)
    return HeadScores("by generation", right, kv_heads=layout.kv_heads), forwards


if __name__ == "__main__":
    main()
