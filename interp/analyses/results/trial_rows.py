"""Trials as rows: mean, interval, gain over the control, and the test against random head sets; and what differs."""

from collections.abc import Sequence
from typing import Any

from interp.analyses.results.set_test import MIN_COUNTED_PROMPTS, SetTest, beyond_together, set_test
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER, Trial, by_task
from interp.errors import UsageError


def rows(result: Any, measures: Sequence[str], task: str | None = None) -> list[dict[str, Any]]:
    """One row for each condition, size and measure, see `Trials.rows`.

    Args:
        result: The trials.
        measures: Some of their measures.
        task: One of their tasks; None for all tasks together.
    """
    found = []
    for condition in result.conditions:
        for size in result.sizes(condition):
            held = {name for trial in result.select(condition, size) for name in trial.values}
            found += [_row(result, condition, size, name, task) for name in measures if name in held]
    return found


def tested(result: Any, condition: str, measure: str, size: float | None, over: str | None) -> SetTest | None:
    """The test of a tested condition against random head sets, see `Trials.set_test`.

    Args:
        result: The trials.
        condition: One of their tested conditions.
        measure: One of their measures.
        size: Size of the condition.
        over: The random condition, by default the one matched by layer where there is one.
    """
    over = over or (RANDOM_BY_LAYER if RANDOM_BY_LAYER in result.conditions else RANDOM)
    own, sized = result.select(condition, size), {(trial.condition, trial.size) for trial in result.trials}
    unmodified = next((name for name in (BASELINE, condition) if (name, 0) in sized), None)
    if result.claim is None or unmodified is None or over not in result.conditions or condition in (over, BASELINE):
        return None
    sets: dict[int, list[Trial]] = {}
    for trial in result.trials:
        if (trial.condition, trial.size) == (over, own[0].size) and trial.matched in ("", condition):
            sets.setdefault(trial.draw, []).append(trial)
    base = result.select(unmodified, 0)
    if not sets or any(measure not in trial.values for trial in base):
        return None
    return set_test(
        _mean_of(result, own, measure),
        [_mean_of(result, trials, measure) for trials in sets.values()],
        _mean_of(result, base, measure),
        result.claim,
        # the first measure decides when the draws end
        result.n_random_sets if measure == result.measures[0] else 0,
    )


def _mean_of(result: Any, trials: Sequence[Trial], measure: str) -> float:
    if missing := [trial.condition for trial in trials if measure not in trial.values]:
        raise UsageError(f"condition {missing[0]!r} has no measure {measure!r}; its trials hold other measures.")
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
    """Tested conditions and sizes that have a control of their size, without those that change nothing.

    Args:
        result: The trials.
        measure: One of their measures.
    """
    return tuple(
        (condition, size)
        for condition in result.tested
        for size in result.sizes(condition)
        if size
        and _has_control(result, condition, size)
        and all(measure in trial.values and measure not in trial.intervals for trial in result.select(condition, size))
    )


def counted(result: Any, measure: str) -> bool:
    """Whether a measure has enough prompts for a verdict: a share needs 10, others need 2.

    Args:
        result: The trials.
        measure: One of its measures.
    """
    least = min(len(trial.values[measure]) for trial in result.trials if measure in trial.values)
    return least >= (MIN_COUNTED_PROMPTS if measure in result.shares else 2)


def _row(result: Any, condition: str, size: float, measure: str, task: str | None) -> dict[str, Any]:
    mean, low, high = result.mean(condition, measure, size=size, task=task)
    row = {"condition": condition, "size": size, "measure": measure, "mean": mean, "low": low, "high": high}
    if condition not in result.tested:
        return row
    if _has_control(result, condition, size) and not any(measure in trial.intervals for trial in result.trials):
        gain = result.gain(condition, measure, size=size, task=task)
        row |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
    if (test := result.set_test(condition, measure, size=size)) is not None:
        row |= {"n_sets": test.n_sets, "n_beyond": test.n_beyond, "p_value": test.p_value, "decided": test.decided}
    return row


def _has_control(result: Any, condition: str, size: float) -> bool:
    return any(
        (trial.condition, trial.size) == (result.control, size) and trial.matched in ("", condition)
        for trial in result.trials
    )
