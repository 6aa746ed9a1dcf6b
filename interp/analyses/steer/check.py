"""The effect of steering on a task, compared with the unmodified model and with the same edit in random heads."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from interp.analyses.causal.random_sets import N_FREE_SETS, drawn, seed_of, settled
from interp.analyses.results import codec
from interp.analyses.results.files import digest
from interp.analyses.results.set_test import N_RANDOM_SETS
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER, Trial
from interp.analyses.results.trials import Trials
from interp.analyses.steer.describe import describe
from interp.errors import HeadError, UsageError
from interp.hooks.edit.edit import Edit, Edits, steering
from interp.hooks.generate import Reply, generate
from interp.hooks.model.heads import HeadLayout, HeadSet, permute_in_layers
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.writer import make_folder

STEERED = "steered"
"""condition of the edit in its own heads"""


@dataclass(frozen=True)
class SteeringCondition:
    """One way to run the task."""

    name: str
    """"baseline", "steered", "random" or "random by layer" """
    edits: Edits
    heads: HeadSet
    """heads that are edited"""
    draw: int = 0
    """number of the random draw"""


def steering_conditions(
    edit: Edit | Edits, layout: HeadLayout, n_random_sets: int = N_RANDOM_SETS, seed: int = 0
) -> tuple[SteeringCondition, ...]:
    """The conditions of `steer_check`: unmodified, steered, and each part of the edit in as many random heads.

    Random heads are drawn in two ways. "random by layer" permutes all heads within each layer, so these sets may share
    heads with the edit, and `Trials.set_test` is exact. There are none where the edit is in all heads of its layers.
    "random" takes heads that no part of the edit names, from all layers, three times at most; these sets describe the
    model and test nothing. There are none where too few heads are left. An edit that holds vectors for its own heads
    (Offset) has no random heads.

    Args:
        edit: The edit, or several added up.
        layout: Layers and heads of the model.
        n_random_sets: Number of random sets that are matched by layer.
        seed: Seed of the draws.

    Raises:
        UsageError: If `n_random_sets` is below 1.

    Examples:
        >>> edit = interp.steer.ZeroTuning(2.0, heads="L0H0")
        >>> conditions = interp.steer.steering_conditions(edit, scores.layout, n_random_sets=1)
        >>> [condition.name for condition in conditions]
        ['baseline', 'steered', 'random', 'random by layer']
    """
    parts = list(Edits(()) + edit)
    if n_random_sets < 1:
        raise UsageError(f"n_random_sets={n_random_sets} is too small for a control; give at least 1.")
    own = [part.chosen(layout) if part.heads else HeadSet(()) for part in parts]
    united = HeadSet(tuple({head for heads in own for head in heads}))
    made = [
        SteeringCondition(BASELINE, Edits(()), HeadSet(())),
        SteeringCondition(STEERED, Edits(tuple(parts)), united),
    ]
    if not all(part.transferable for part in parts) or not len(united):
        return tuple(made)
    reach = [replace(part, heads="all").chosen(layout) for part in parts]
    for name, n in ((RANDOM, min(n_random_sets, N_FREE_SETS)), (RANDOM_BY_LAYER, n_random_sets)):
        for i in range(n):
            sets = _draw(name, own, reach, layout, seed_of(seed, describe(edit), united, i))
            if sets is None:
                break
            moved = Edits(tuple(replace(p, heads=str(heads)) for p, heads in zip(parts, sets, strict=True)))
            made.append(SteeringCondition(name, moved, HeadSet(tuple({h for heads in sets for h in heads})), i))
    return tuple(made)


def _draw(name: str, own: list[HeadSet], reach: list[HeadSet], layout: HeadLayout, seed: int) -> list[HeadSet] | None:
    """Random heads for each part of an edit among those that it can act on, or None where no others can be drawn."""
    united = HeadSet(tuple({head for heads in own for head in heads}))
    if name == RANDOM_BY_LAYER:
        whole = all(len(of_layer) == layout.heads for heads in own for of_layer in heads.by_layer().values())
        return None if whole else permute_in_layers(own, layout, seed)
    try:
        outside = [(united - heads) | (layout.all() - within) for heads, within in zip(own, reach, strict=True)]
        return [heads.random_like(layout, seed, exclude=other) for heads, other in zip(own, outside, strict=True)]
    except HeadError:
        return None


def steer_check(
    model: nn.Module,
    prompts: Prompts,
    edit: Edit | Edits,
    *,
    judge: Callable[[str, Prompt], bool],
    max_new_tokens: int = 32,
    stop: str | None = None,
    n_random_sets: int = N_RANDOM_SETS,
    stop_early: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Trials:
    """Accuracy of greedy replies: unmodified, steered, and with the same edit in as many random heads.

    `accuracy[condition] = mean over prompts of judge(reply, prompt)`. Intervals are over prompts, and over prompts and
    draws for the random conditions, see `steering_conditions`, which are missing where no other heads can be drawn.
    `Trials.set_test` ranks the edit among the sets matched by layer, and `Trials.gain` compares prompt by prompt.

    Use prompts on which neither the heads nor the settings were chosen, such as the test split of a task.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts of the task.
        edit: The edit, or several added up.
        judge: Reply and prompt -> whether the reply is right, such as `Task.judge`.
        max_new_tokens: Longest reply.
        stop: Text that ends a reply.
        n_random_sets: Number of random sets matched by layer; a verdict of `Trials.set_test` needs at least 39. Up to 3
            sets of other heads are also drawn, from all layers.
        stop_early: End the draws where the verdict is certain: after 39 sets if none has so high an accuracy, or once
            so many have that no further set can change the verdict, see `SetTest`.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the draws and of the confidence intervals.
        folder: Finished conditions are stored here, so that a killed check continues.
        progress: Show a progress bar.

    Returns:
        Trials: conditions "baseline", "steered", "random", "random by layer"; measure "accuracy", with all replies.

    Raises:
        UsageError: If `n_random_sets` is below 1.

    Examples:
        >>> edit = interp.steer.Boost("first", 4.0, heads="L0H0")
        >>> trials = interp.steer.steer_check(
        ...     model, prompts, edit, judge=lambda reply, prompt: True, max_new_tokens=2, n_random_sets=1
        ... )
        >>> trials.mean("steered").mean
        1.0

    Source:
        This package, after the masking control of Wu et al. 2404.15574.

    Limits:
        Does not show that a gain comes from the mechanism that the method claims, since a judge sees only the reply.
    """
    from tqdm.auto import tqdm

    conditions = steering_conditions(edit, HeadLayout.of(model), n_random_sets, seed)
    provenance = Provenance.of(model, prompts.tokenizer, seed=seed)
    shared = [provenance.config_hash, provenance.weights_hash, provenance.dtype, provenance.versions]
    shared += [prompts.fingerprint(), max_new_tokens, stop, batch_size]
    size = len(conditions[1].heads)
    bar = tqdm(desc="steering check", unit="head set", disable=not progress, delay=2, leave=False)

    def trial(condition: SteeringCondition) -> Trial:
        bar.update()
        path = None
        if folder is not None:
            make_folder(folder)
            key = digest([shared, condition.name, condition.draw, [part.to_dict() for part in condition.edits]])
            path = Path(folder) / f"steer_check-{key}.json"
        if path is not None and path.is_file():
            return codec.load(path)
        replies = steered_replies(
            model, prompts, condition.edits, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size
        )
        texts = tuple(reply.text for reply in replies)
        verdicts = tuple(float(judge(text, prompt)) for text, prompt in zip(texts, prompts, strict=True))
        made = Trial(
            condition.name,
            {"accuracy": verdicts},
            heads=condition.heads,
            matched=STEERED if condition.name in (RANDOM, RANDOM_BY_LAYER) else "",
            size=0 if condition.name == BASELINE else size,
            draw=condition.draw,
            replies=texts,
        )
        if path is not None:
            codec.save(made, path, is_step=True)
        return made

    with bar:
        trials = [trial(condition) for condition in conditions if condition.name != RANDOM_BY_LAYER]
        baseline, steered = trials[:2]

        def ended(random: Sequence[Trial]) -> bool:
            return stop_early and settled(random, n_random_sets, baseline, steered, "higher", first_look=True)

        by_layer = [condition for condition in conditions if condition.name == RANDOM_BY_LAYER]
        trials += drawn(trial, by_layer, ended)
    answers, questions = (tuple(str(prompt.meta.get(key, "")) for prompt in prompts) for key in ("answer", "question"))
    return Trials(
        name="steering",
        trials=tuple(trials),
        intervention=describe(edit),
        title="Steering",
        shares=("accuracy",),
        control=RANDOM_BY_LAYER,
        claim="higher",
        n_random_sets=n_random_sets,
        questions=questions,
        answers=answers,
        seed=seed,
        provenance=provenance,
    )


def steered_replies(
    model: nn.Module,
    prompts: Prompts,
    edits: Edit | Edits,
    *,
    max_new_tokens: int,
    stop: str | None,
    batch_size: int = 8,
) -> Iterator[Reply]:
    """Generate greedy replies under edits.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts to continue.
        edits: The edits; none leave the model unmodified.
        max_new_tokens: Longest reply.
        stop: Text that ends a reply.
        batch_size: Number of prompts per forward pass.

    Returns:
        One reply for each prompt, in order.
    """
    every: Any = Edits(()) + edits
    for batch in prompts.batches(batch_size):
        with steering(model, every, batch) if len(every.edits) else contextlib.nullcontext():
            yield from generate(model, batch, max_new_tokens=max_new_tokens, stop=stop)
