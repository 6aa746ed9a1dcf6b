"""The effect of steering on a task, compared with the unmodified model and with the same edit in random heads."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from interp.analyses.results import codec
from interp.analyses.results.files import digest
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER, Trial
from interp.analyses.results.trials import Trials
from interp.analyses.steer.describe import describe
from interp.errors import HeadError, UsageError
from interp.hooks.edit.edit import Edit, Edits, steering
from interp.hooks.generate import Reply, generate
from interp.hooks.model.heads import HeadLayout, HeadSet, permute_in_layers
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts

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
    edit: Edit | Edits, layout: HeadLayout, n_random_sets: int = 3, seed: int = 0
) -> tuple[SteeringCondition, ...]:
    """The conditions of `steer_check`: unmodified, steered, and each part of the edit in as many random heads.

    Random heads are drawn in two ways. "random" takes heads that no part of the edit names, from all layers. "random by
    layer" permutes all heads within each layer, so these sets may share heads with the edit, and `Trials.set_test` is
    exact. There are none where too few heads are left, or where an edit holds vectors for its own heads (Offset).

    Args:
        edit: The edit, or several added up.
        layout: Layers and heads of the model.
        n_random_sets: Number of random draws of each kind.
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
    for name in (RANDOM, RANDOM_BY_LAYER):
        for i in range(n_random_sets):
            try:
                # other heads, which describe the model; and a permutation of all heads, which is a test
                drawn = (
                    [heads.random_like(layout, seed + i, exclude=united - heads) for heads in own]
                    if name == RANDOM
                    else permute_in_layers(own, layout, seed + i)
                )
            except HeadError:
                return tuple(made)
            moved = Edits(tuple(replace(p, heads=str(heads)) for p, heads in zip(parts, drawn, strict=True)))
            heads = HeadSet(tuple({head for part in drawn for head in part}))
            made.append(SteeringCondition(name, moved, heads, i))
    return tuple(made)


def steer_check(
    model: nn.Module,
    prompts: Prompts,
    edit: Edit | Edits,
    *,
    judge: Callable[[str, Prompt], bool],
    max_new_tokens: int = 32,
    stop: str | None = None,
    n_random_sets: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Trials:
    """Accuracy of greedy replies: unmodified, steered, and with the same edit in as many random heads.

    `accuracy[condition] = mean over prompts of judge(reply, prompt)`. Intervals are over prompts, and over prompts and
    draws for the random conditions, see `steering_conditions`, which are missing where too few other heads are left.
    `Trials.gain` compares conditions prompt by prompt.

    Use prompts on which neither the heads nor the settings were chosen, such as the test split of a task.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts of the task.
        edit: The edit, or several added up.
        judge: Reply and prompt -> whether the reply is right, such as `Task.judge`.
        max_new_tokens: Longest reply.
        stop: Text that ends a reply.
        n_random_sets: Number of random draws of each kind; a verdict of `Trials.set_test` needs at least 39.
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
    trials = []
    for condition in tqdm(conditions, desc="steering check", disable=not progress, delay=2, leave=False):
        path = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            key = digest([shared, condition.name, condition.draw, [part.to_dict() for part in condition.edits]])
            path = Path(folder) / f"steer_check-{key}.json"
        if path is not None and path.is_file():
            trials.append(codec.load(path))
            continue
        replies = steered_replies(
            model, prompts, condition.edits, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size
        )
        texts = tuple(reply.text for reply in replies)
        verdicts = tuple(float(judge(text, prompt)) for text, prompt in zip(texts, prompts, strict=True))
        trial = Trial(
            condition.name,
            {"accuracy": verdicts},
            heads=condition.heads,
            matched=STEERED if condition.name in (RANDOM, RANDOM_BY_LAYER) else "",
            size=0 if condition.name == BASELINE else size,
            draw=condition.draw,
            replies=texts,
        )
        if path is not None:
            codec.save(trial, path)
        trials.append(trial)
    answers, questions = (tuple(str(prompt.meta.get(key, "")) for prompt in prompts) for key in ("answer", "question"))
    return Trials(
        name="steering",
        trials=tuple(trials),
        intervention=describe(edit),
        title="Steering",
        shares=("accuracy",),
        claim="higher",
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
