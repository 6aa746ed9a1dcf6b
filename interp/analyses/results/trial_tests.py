"""The test of a tested condition of trials against the random head sets that were drawn for it."""

from typing import Any

from interp.analyses.results.set_test import SetTest, is_settled, set_test
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER, RANDOM_KEPT, Trial, by_task


def tested_set(result: Any, condition: str, measure: str, size: float | None, over: str | None) -> SetTest | None:
    """See `Trials.set_test`.

    Args:
        result: The trials.
        condition: One of their tested conditions.
        measure: One of their measures.
        size: One of the sizes of the condition.
        over: The condition of random heads.
    """
    claim, tested = result.claims.get(condition, result.claim), result.select(condition, size)
    sized = {(trial.condition, trial.size) for trial in result.trials}
    unmodified = next((name for name in (BASELINE, condition) if (name, 0) in sized), None)
    if claim is None or unmodified is None or condition == BASELINE:
        return None
    sets = _sets(result, condition, tested[0].size, over)
    base = result.select(unmodified, 0)
    if not sets or any(measure not in trial.values for trials in (base, tested, *sets) for trial in trials):
        return None
    values = [mean_of(trials, measure) for trials in sets]
    own, unmodified_value = mean_of(tested, measure), mean_of(base, measure)
    # draws end where the first measure is decided, or all of them
    ended = measure == result.measures[0] or is_settled(
        own, values, unmodified_value, claim, result.n_random_sets, first_look=False
    )
    return set_test(own, values, unmodified_value, claim, result.n_random_sets if ended else 0)


def mean_of(trials: Any, measure: str) -> float:
    """Mean over prompts and draws, with the same weight for each task.

    Args:
        trials: Trials of one condition and size.
        measure: One of their measures.
    """
    rows = by_task(trials, [trial.values[measure] for trial in trials])
    return sum(sum(row) / len(row) for row in rows) / len(rows)


def _sets(result: Any, condition: str, size: float, over: str | None) -> list[list[Trial]]:
    """The trials of each random head set of a condition and size."""
    names = result.conditions
    controls = (over,) if over else tuple(name for name in (RANDOM_BY_LAYER, RANDOM_KEPT) if name in names) or (RANDOM,)
    for control in controls:
        found: dict[int, list[Trial]] = {}
        for trial in result.trials:
            if (trial.condition, trial.size) == (control, size) and trial.matched in ("", condition):
                found.setdefault(trial.draw, []).append(trial)
        if found and control != condition:
            return list(found.values())
    return []
