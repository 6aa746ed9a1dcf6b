"""Cost of Ships over all heads, compared with separate forward passes that ablate one head each.

    python -m benchmarks.ships [--prompts 16] [--sample 30]

The script uses the demo model and the requests of the package as chats. Separate forward passes are timed before and
after the sweep on a sample of heads and prompts, with one prompt and one head each. The ratio is the time of the sweep
divided by that of prompts x (L H + 1) separate passes. Their divergences are compared with those of the sweep.
"""

import argparse
import random
import time
from typing import Any

import torch

import interp
from interp import tasks
from interp.analyses.identify.ships import ships
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--sample", type=int, default=30)
    arguments = parser.parse_args()
    loaded: Any = interp.load(arguments.model, dtype="float32")
    prompts = tasks.refusal.requests(loaded.tokenizer, "harmful", arguments.prompts)
    layout = HeadLayout.of(loaded.model)
    whole = len(prompts) * (layout.size + 1)
    print(f"{prompts}, {layout.size} heads: {whole:,} separate forward passes")
    for kind in ("zero", "uniform"):
        before, _ = separate(loaded.model, prompts, layout, kind, arguments.sample, 0)
        start = time.perf_counter()
        found = ships(loaded.model, prompts, ablation=kind, judge=None, batch_size=arguments.prompts)
        seconds = time.perf_counter() - start
        after, pairs = separate(loaded.model, prompts, layout, kind, arguments.sample, 1)
        apart = max(abs(value - float(found.per_prompt[n, head.layer, head.head])) for n, head, value in pairs)
        each = (before + after) / 2
        print(
            f"{kind:8s} {seconds:6.1f} s, {found.settings['forwards']:,.0f} whole forward passes "
            f"({found.settings['forwards'] / whole:.2f} of them); separate passes {each * whole:6.1f} s; "
            f"ratio {seconds / (each * whole):.3f}; largest difference of a KL divergence {apart:.1e}",
            flush=True,
        )


def separate(
    model: Any, prompts: Prompts, layout: HeadLayout, kind: Any, sample: int, seed: int
) -> tuple[float, list[tuple[int, Head, float]]]:
    """Return the seconds of one forward pass with an ablated head, and the divergences of a sample."""
    draw = random.Random(seed)
    chosen = [(draw.randrange(len(prompts)), draw.choice(list(layout.all()))) for _ in range(sample)]
    rows = [prompts[n : n + 1].tensors(model.device) for n, _ in chosen]
    with torch.no_grad():
        base = [model(**row, use_cache=False, logits_to_keep=1).logits[0, -1].double().log_softmax(-1) for row in rows]
        start = time.perf_counter()
        after = []
        for row, (_, head) in zip(rows, chosen, strict=True):
            with ablate(model, HeadSet((head,)), kind):
                after.append(model(**row, use_cache=False, logits_to_keep=1).logits[0, -1])
        seconds = (time.perf_counter() - start) / sample
    found = []
    for p, q, (n, head) in zip(base, after, chosen, strict=True):
        found.append((n, head, float((p.exp() * (p - q.double().log_softmax(-1))).sum())))
    return seconds, found


if __name__ == "__main__":
    main()
