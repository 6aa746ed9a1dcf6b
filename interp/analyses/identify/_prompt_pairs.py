"""Pairs of prompts, the metric on their logits, and scores from two runs of each pair, as all patchings use them."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.causal.ablated_measures import source_of_numbers
from interp.analyses.causal.function_identity import function_identity
from interp.analyses.measures.head_outputs import bridged, by_length, ids
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, UsageError
from interp.hooks.model.finite import check_model
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context

Metric = Callable[[Tensor, Prompts], Tensor]
"""function of the logits [b v] at the last position and the clean prompts of these rows that gives [b] numbers"""
UNITS = {True: "share of the mean difference", False: "metric"}
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
    folder: Any,
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
        normalize: Divide by the mean difference between the runs.
        batch_size: Number of pairs that run together.
        seed: Seed of the confidence intervals over prompts.
        folder: Where finished batches are kept; None to keep nothing.
        progress: Show a progress bar.
        settings: Further settings to store.
    """
    check_pairs(model, clean, corrupt, direction)
    layout = HeadLayout.of(model)
    effect = torch.empty(len(clean), layout.layers, layout.heads)
    at_clean, at_corrupt = torch.empty(2, len(clean))
    made = source_of_numbers(Provenance.of(model, clean.tokenizer))
    about = None if folder is None else [clean.fingerprint(), corrupt.fingerprint(), function_identity(metric)]
    parts = Parts.of(folder, name, [*made, about, direction, settings])
    bar = tqdm(total=len(clean) * layout.layers, desc=name, disable=not progress, delay=2, leave=False)
    with bar, bridged(model) as tl:
        for index, (ours, theirs) in by_length(clean, corrupt, batch_size=batch_size):
            runs = (theirs, ours, ours) if direction == "denoise" else (ours, theirs, ours)
            work = partial(_measured_pairs, measure, tl, runs, partial(bar.update, len(index)))
            end, part = bar.n + len(index) * layout.layers, parts.get(index, work)
            bar.update(end - bar.n)
            ends = (part["source"], part["base"]) if direction == "denoise" else (part["base"], part["source"])
            effect[index] = part["toward"] if direction == "denoise" else -part["toward"]
            at_clean[index], at_corrupt[index] = ends
    shares, mean = scored(effect, at_clean, at_corrupt, normalize)
    settings = {"metric": metric, "direction": direction, "normalize": normalize, **settings}
    # tables with other denominators have no common mean, and `concat` refuses to join tables with other settings
    settings |= {"mean_difference": mean} if normalize else {}
    extras = {"difference": (at_clean - at_corrupt)[:, None, None].expand_as(effect)}
    return table(name, model, clean, shares, UNITS[normalize], seed, extras, **settings)


def _measured_pairs(
    measure: Measure, tl: Any, runs: tuple[Prompts, Prompts, Prompts], done: Callable[[], Any]
) -> dict[str, Tensor]:
    try:
        toward, base, source = measure(tl, *runs, done)
    except UsageError:
        # a model that computes NaN is named before a metric that does
        for prompts in runs[:2]:
            check_model(tl, {"input_ids": ids(prompts, tl)})
        raise
    return {"toward": toward, "base": base, "source": source}


def scored(
    effect: Float[Tensor, "n l h"], clean: Float[Tensor, "n"], corrupt: Float[Tensor, "n"], normalize: bool
) -> tuple[Float[Tensor, "n l h"], float | None]:
    """Scores from effects, and the mean difference that they are divided by.

    `score[n l h] = effect[n l h] / mean over the pairs that count of (clean - corrupt)`, so that the mean score is a
    ratio of means, in which a pair with a small difference has a small weight. A pair counts where its metric is higher
    on the clean prompt; the scores of others are NaN.

    Args:
        effect: Change of the metric by each patch, positive for heads that support the clean answer.
        clean: Metric of the clean runs.
        corrupt: Metric of the corrupt runs.
        normalize: Divide by the mean difference; otherwise the scores are the effects.

    Returns:
        The scores, and the mean difference, None where no pair counts.
    """
    # a difference that rounding makes shows nothing
    shown = (clean > corrupt) & ~torch.isclose(clean, corrupt)
    mean = float((clean - corrupt)[shown].double().mean()) if shown.any() else None
    scores = effect / mean if normalize and mean is not None else effect
    return torch.where(shown[:, None, None], scores, torch.nan), mean


def table(
    name: str,
    model: nn.Module,
    prompts: Prompts,
    values: Float[Tensor, "b l h"],
    unit: str,
    seed: int,
    extras: dict[str, Tensor] | None = None,
    **settings: Any,
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
        extras=extras or {},
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", "")) for prompt in prompts),
    )
