"""Tests of the conditions of trials against the random head sets that were drawn for them, and what differs."""

from typing import Any

from interp.analyses.results.set_test import MIN_COUNTED_PROMPTS, SetTest, beyond_together, is_settled, set_test
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER, RANDOM_KEPT, Trial, by_task
from interp.analyses.results.trial_rows import has_control


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


def findings(result: Any, measure: str) -> tuple[tuple[str, float], ...]:
    """Conditions and sizes that differ from their control, see `Trials.findings`.

    Args:
        result: The trials.
        measure: One of their measures.
    """
    if not counted(result, measure):
        return ()
    places = compared(result, measure)
    if result.claim is not None:
        tests = {place: result.set_test(place[0], measure, size=place[1]) for place in places}
        return beyond_together({place: test for place, test in tests.items() if test is not None})
    clear = [place for place in places if result.gain(place[0], measure, size=place[1]).excludes_zero]
    n = len(places)
    return tuple(
        place for place in clear if result.gain(place[0], measure, size=place[1], n_comparisons=n).excludes_zero
    )


def compared(result: Any, measure: str) -> tuple[tuple[str, float], ...]:
    """Tested conditions and sizes that have a control, without those that change nothing.

    Args:
        result: The trials.
        measure: One of their measures.
    """

    def has(condition: str, size: float) -> bool:
        if result.claim is None:
            return has_control(result, condition, size, measure)
        return result.set_test(condition, measure, size=size) is not None

    return tuple(
        (condition, size)
        for condition in result.tested
        for size in result.sizes(condition)
        if size
        and all(measure in trial.values and measure not in trial.intervals for trial in result.select(condition, size))
        and has(condition, size)
    )


def counted(result: Any, measure: str) -> bool:
    """Whether a measure has enough prompts for a verdict: a share needs 10, others need 2.

    Args:
        result: The trials.
        measure: One of its measures.
    """
    least = min(len(trial.values[measure]) for trial in result.trials if measure in trial.values)
    return least >= (MIN_COUNTED_PROMPTS if measure in result.shares else 2)


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
