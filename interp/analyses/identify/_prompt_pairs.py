"""What the patchings share: pairs of prompts, the metric on their logits, and scores from two runs of each pair."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.measures.continuations import Options
from interp.analyses.measures.head_outputs import bridged, by_length
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context

Metric = Callable[[Tensor, Prompts], Tensor]
"""logits [b v] at the last position and the clean prompts of these rows to one number each, [b]"""
UNITS = {True: "share of the difference", False: "metric"}
"""of a score, by normalize"""
Direction = Literal["denoise", "noise"]
Measure = Callable[..., tuple[Float[Tensor, "b l h"], Float[Tensor, "b"], Float[Tensor, "b"]]]
"""(bridge, base, source, clean prompts of one length, done) to what a patch from the source run adds to the metric of
the base run, and the metric of both; done() after each layer"""


def logit_difference(logits: Float[Tensor, "b v"], prompts: Prompts) -> Float[Tensor, "b"]:
    """The logit of the right answer less that of the wrong one, each the first token of the first one in the meta."""
    ids = answer_tokens(prompts).to(logits.device)
    right, wrong = logits.gather(1, ids).unbind(1)
    return right - wrong


def answer_tokens(prompts: Prompts) -> Int[Tensor, "b 2"]:
    """First token of the first of meta["right"] and of meta["wrong"]. PromptError without, or where they are one."""
    options = Options.of(prompts)
    rows = [(ids[0][0], ids[count][0]) for ids, count in zip(options.ids, options.right, strict=True)]
    for number, (right, wrong) in enumerate(rows):
        if right == wrong:
            raise PromptError(
                f"the right and the wrong answer of prompt {number} both begin with token {right}: give answers that "
                "differ in their first token, or a metric of your own."
            )
    return torch.tensor(rows)


def measured(metric: Metric, logits: Float[Tensor, "b q v"], prompts: Prompts) -> Float[Tensor, "b"]:
    """The metric at the last position, checked."""
    values: Any = metric(logits[:, -1].float(), prompts)
    if not isinstance(values, Tensor) or values.shape != (len(prompts),):
        given = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UsageError(f"the metric gave {given} for {len(prompts)} prompts: return a tensor of one number for each.")
    if not values.isfinite().all():
        raise UsageError(f"the metric gave {values.tolist()}: return finite numbers only.")
    return values.float()


def check_pairs(model: nn.Module, clean: Prompts, corrupt: Prompts, direction: str) -> None:
    """Raise UsageError for another direction, PromptError where the prompts are no pairs of equal length."""
    if direction not in get_args(Direction):
        raise UsageError(f"direction={direction!r}: take 'denoise' (clean into corrupt) or 'noise' (the reverse).")
    if len(clean) != len(corrupt):
        raise PromptError(f"{len(clean)} clean and {len(corrupt)} corrupt prompts: give one of each for a pair.")
    for number, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        if len(one) != len(other):
            raise PromptError(
                f"pair {number} has {len(one)} tokens clean and {len(other)} corrupt: patching goes position by "
                "position, so give prompts of equal length."
            )
    check_context(model, clean)


def effects(
    name: str,
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts,
    metric: Metric,
    measure: Measure,
    direction: Direction,
    normalize: bool,
    batch_size: int,
    seed: int,
    progress: bool,
    **settings: Any,
) -> HeadScores:
    """The table of a patching, from what `measure` tells of the pairs of one length."""
    check_pairs(model, clean, corrupt, direction)
    layout = HeadLayout.of(model)
    found = torch.empty(len(clean), layout.layers, layout.heads)
    bar = tqdm(total=len(clean) * layout.layers, desc=name, disable=not progress, delay=2, leave=False)
    with bar, bridged(model) as tl:
        for index, (ours, theirs) in by_length(clean, corrupt, batch_size=batch_size):
            base, source = (theirs, ours) if direction == "denoise" else (ours, theirs)
            toward, at_base, at_source = measure(tl, base, source, ours, partial(bar.update, len(index)))
            found[index] = scored(toward, at_base, at_source, direction, normalize)
    settings = {"metric": metric, "direction": direction, "normalize": normalize, **settings}
    return table(name, model, clean, found, UNITS[normalize], seed, **settings)


def scored(
    toward: Float[Tensor, "b l h"],
    base: Float[Tensor, "b"],
    source: Float[Tensor, "b"],
    direction: str,
    normalize: bool,
) -> Float[Tensor, "b l h"]:
    """From what a patch from the source run adds to the metric of the base run: positive speaks for the clean answer.

    normalize: over the metric's difference between the runs, NaN where there is none.
    """
    if not normalize:
        return toward if direction == "denoise" else -toward
    return toward / torch.where(torch.isclose(base, source), torch.nan, source - base)[:, None, None]


def table(
    name: str, model: nn.Module, prompts: Prompts, values: Float[Tensor, "b l h"], unit: str, seed: int, **settings: Any
) -> HeadScores:
    """HeadScores of these prompts; a metric is written down by its name."""
    if "metric" in settings:
        settings["metric"] = getattr(settings["metric"], "__name__", type(settings["metric"]).__name__)
    return HeadScores(
        name=name,
        per_prompt=values,
        unit=unit,
        kv_heads=HeadLayout.of(model).kv_heads,
        settings=settings,
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", "")) for prompt in prompts),
    )
