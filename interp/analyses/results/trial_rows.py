"""Trials as rows: mean, interval, gain over the control, and the test against random head sets."""

from collections.abc import Sequence
from typing import Any


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
