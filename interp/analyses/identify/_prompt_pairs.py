"""Pairs of prompts, the metric on their logits, and scores from two runs of each pair, as all patchings use them."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.measures.head_outputs import bridged, by_length
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context

Metric = Callable[[Tensor, Prompts], Tensor]
"""function of the logits [b v] at the last position and the clean prompts of these rows that gives [b] numbers"""
UNITS = {True: "share of the difference", False: "metric"}
"""unit of a score, by `normalize`"""
Direction = Literal["denoise", "noise"]
Measure = Callable[..., tuple[Float[Tensor, "b l h"], Float[Tensor, "b"], Float[Tensor, "b"]]]
"""function of a bridge, the base, source and clean prompts of one length, and a callback after each layer; it gives the
change of the base run's metric by each patch from the source run, and the metric of both runs"""


def measured(metric: Metric, logits: Float[Tensor, "b q v"], prompts: Prompts) -> Float[Tensor, "b"]:
    """The metric at the last position of each prompt.

    Raises:
        UsageError: If the metric gives anything but one finite number for each prompt.
    """
    values: Any = metric(logits[:, -1].float(), prompts)
    if not isinstance(values, Tensor) or values.shape != (len(prompts),):
        given = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UsageError(
            f"the metric gave {given} for {len(prompts)} prompts; return a tensor with one number for each."
        )
    if not values.isfinite().all():
        raise UsageError(f"the metric gave {values.tolist()}; return finite numbers only.")
    return values.float()


def check_pairs(model: nn.Module, clean: Prompts, corrupt: Prompts, direction: str) -> None:
    """Check the direction of a patching, and that the prompts are pairs.

    Raises:
        UsageError: If the direction is unknown.
        PromptError: If the prompts are not pairs of equal length, or do not fit into the context of the model.
    """
    if direction not in get_args(Direction):
        raise UsageError(
            f"unknown direction {direction!r}; choose from 'denoise' (clean into corrupt), 'noise' (the reverse)."
        )
    if len(clean) != len(corrupt):
        raise PromptError(
            f"{len(clean)} clean and {len(corrupt)} corrupt prompts do not form pairs; give one of each for a pair."
        )
    for number, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        if len(one) != len(other):
            raise PromptError(
                f"pair {number} has {len(one)} tokens clean and {len(other)} corrupt; give prompts of equal "
                "length, since patching goes position by position."
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
    """The scores of a patching, from what `measure` gives for the pairs of each length.

    Args:
        name: Name of the scores.
        model: A transformers causal language model, or a TransformerBridge over one.
        clean: Clean prompts.
        corrupt: The partner of each clean prompt.
        metric: The metric, whose name is stored.
        measure: Function that runs the pairs of one length.
        direction: Which run is patched.
        normalize: Divide by the metric's difference between the runs.
        batch_size: Number of pairs that run together.
        seed: Seed of the intervals.
        progress: Show a progress bar.
        settings: Further settings to store.
    """
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
    """Scores from the change of the base run's metric, positive for heads that support the clean answer.

    With `normalize` they are divided by the metric's difference between the runs, and are NaN where there is none.
    """
    if not normalize:
        return toward if direction == "denoise" else -toward
    return toward / torch.where(torch.isclose(base, source), torch.nan, source - base)[:, None, None]


def table(
    name: str, model: nn.Module, prompts: Prompts, values: Float[Tensor, "b l h"], unit: str, seed: int, **settings: Any
) -> HeadScores:
    """HeadScores of these prompts; a metric is stored by its name."""
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
