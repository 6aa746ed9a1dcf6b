"""Trials of several tasks, or of several batches of prompts, in one result."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from interp.analyses.results.trial import Trial
from interp.errors import UsageError


def joined(parts: Sequence[Any]) -> Any:
    """The trials of all parts in one result, see `Trials.concat`.

    Args:
        parts: Trials of one experiment.
    """
    if not parts:
        raise UsageError("no trials to join; give at least one part.")
    first = parts[0]
    for part in parts[1:]:
        for key in ("name", "intervention", "measures", "seed"):
            if getattr(part, key) != getattr(first, key):
                raise UsageError(
                    f"trials differ in {key} ({getattr(first, key)!r} and {getattr(part, key)!r}); "
                    "join parts of one experiment."
                )
    found: dict[Any, Trial] = {}
    for trial in (trial for part in parts for trial in part.trials):
        key = trial.condition, trial.matched, trial.task, trial.size, trial.draw
        found[key] = _follow(found[key], trial) if key in found else trial
    texts = {name: tuple(text for part in parts for text in getattr(part, name)) for name in ("questions", "answers")}
    return replace(first, trials=tuple(found.values()), **texts)


def _follow(one: Trial, other: Trial) -> Trial:
    """The prompts of one trial, then those of another of the same condition."""
    if one.heads != other.heads or one.intervals or other.intervals or one.values.keys() != other.values.keys():
        raise UsageError(
            f"trials of {one.condition!r} differ in heads or measures, or hold intervals; join batches of prompts only."
        )
    n, m = (len(next(iter(trial.values.values()))) for trial in (one, other))
    return replace(
        one,
        values={name: values + other.values[name] for name, values in one.values.items()},
        replies=one.replies + other.replies,
        facts={name: (n * x + m * other.facts.get(name, x)) / (n + m) for name, x in one.facts.items()},
    )
