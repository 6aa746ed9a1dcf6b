"""What a profile in rounds costs and finds, beside every head on every prompt and beside the paper's procedure.

    python -m benchmarks.profiling [--task json --items 16] [--generate] [--folder DIR]

Two profiles of PASTA's heads on the demo model with the same prompts: in rounds, and exhaustive. --generate adds the
procedure of the paper on the same prompts, each head alone, greedy replies, judged; many heads are rows of one batch,
which changes no reply. A generation counts as one forward for its prompt and one for each new token.
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
"""prompts of a task in the paper"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--task", default="json")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--folder", help="finished parts, kept between calls")
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
    told("in rounds", rounds.cost)
    told("every head, every prompt", whole.cost)
    for k in (10, 25, 50):
        print(f"  top {k}: {len(rounds.heads(k) & whole.heads(k))} of {k} shared (chance {k * k / layout.size:.1f})")
    for n in (len(prompts), PAPER):
        paper = layout.size * n * (1 + task.max_new_tokens)
        print(f"  the paper's procedure on {n:,} prompts: up to {paper:,} forwards, those of new tokens included")
    if arguments.generate:
        table, forwards = generated(loaded.model, prompts, edit, task)
        print(f"  by generation on the same prompts: {forwards:,.0f} forwards")
        for k in (10, 25, 50):
            print(f"  top {k}: {shared(table, rounds, k)} with rounds, {shared(table, whole, k)} with all on all")
            halves = [replace(table, per_prompt=table.per_prompt[i::2], labels=()) for i in range(2)]
            print(f"    two halves of its prompts share {halves[0].compare(halves[1], k).overlap} with each other")


def told(name: str, cost: dict[str, float]) -> None:
    print(
        f"  {name}: {cost['prompts']:,.0f} prompts read, as {cost['forwards']:,.0f} whole forwards, and "
        f"{cost['continuations']:,.0f} short continuations"
    )


def shared(table: HeadScores, found: steer.Profile, k: int) -> str:
    """Heads of the top k of a profile that are in the top k by generation, surely and, where replies tie, at best."""
    values = table.values.flatten()
    edge = values.sort(descending=True).values[k - 1]
    chosen = found.heads(k)
    above = sum(table[head] > edge for head in chosen)
    tied = min(sum(table[head] == edge for head in chosen), k - int((values > edge).sum()))
    ties = int((values == edge).sum())
    return f"{above} to {above + tied} of {k} ({ties} heads tie for the last {k - int((values > edge).sum())} places)"


def generated(model: Any, prompts: Prompts, edit: Any, task: tasks.Task) -> tuple[HeadScores, float]:
    """Accuracy of replies with each head steered alone."""
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
