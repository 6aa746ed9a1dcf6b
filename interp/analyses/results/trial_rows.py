"""Trials as rows: mean, interval, gain over the control, and the test against random head sets."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from interp.analyses.results.trial import DRAWN


class Group(NamedTuple):
    """Trials that share a row or a line: those of one condition, and for random heads those of one matched set."""

    label: str
    """the condition; where random heads are matched to several conditions, both names"""
    condition: str
    matched: str | None
    """the condition that random heads are matched to; None for all"""


def groups(result: Any) -> list[Group]:
    """The groups of some trials, in the order of the trials.

    Args:
        result: The trials.
    """
    found = []
    for condition in result.conditions:
        names = tuple(dict.fromkeys(trial.matched for trial in result.trials if trial.condition == condition))
        if condition not in DRAWN or len(names) == 1:
            found.append(Group(condition, condition, None))
        else:
            found += [Group(f"{condition} for {name}" if name else condition, condition, name) for name in names]
    return found


def sizes(result: Any, group: Group) -> tuple[float, ...]:
    """The sizes of a group, in the order of the trials.

    Args:
        result: The trials.
        group: One of their groups.
    """
    if group.matched is None:
        return result.sizes(group.condition)
    chosen = [t for t in result.trials if (t.condition, t.matched) == (group.condition, group.matched)]
    return tuple(dict.fromkeys(trial.size for trial in chosen))


def frame(result: Any) -> Any:
    """See `Trials.to_frame`.

    Args:
        result: The trials.
    """
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "condition": trial.condition, "task": trial.task, "size": trial.size, "draw": trial.draw,
                "heads": str(trial.heads) if len(trial.heads) else "", "measure": measure, "prompt": prompt,
                "value": value,
            }
            for trial in result.trials
            for measure, values in trial.values.items()
            for prompt, value in enumerate(values)
        ]
    )  # fmt: skip


def rows(result: Any, measures: Sequence[str], task: str | None = None) -> list[dict[str, Any]]:
    """One row for each group, size and measure, see `Trials.rows`.

    Args:
        result: The trials.
        measures: Some of their measures.
        task: One of their tasks; None for all tasks together.
    """
    found = []
    for group in groups(result):
        for size in sizes(result, group):
            chosen = result.select(group.condition, size, matched=group.matched)
            held = {name for trial in chosen for name in trial.values}
            found += [_row(result, group, size, name, task) for name in measures if name in held]
    return found


def _row(result: Any, group: Group, size: float, measure: str, task: str | None) -> dict[str, Any]:
    condition = group.condition
    mean, low, high = result.mean(condition, measure, size=size, task=task, matched=group.matched)
    row = {"condition": group.label, "size": size, "measure": measure, "mean": mean, "low": low, "high": high}
    if condition not in result.tested:
        return row
    if has_control(result, condition, size, measure) and not any(measure in trial.intervals for trial in result.trials):
        gain = result.gain(condition, measure, size=size, task=task)
        row |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
    if (test := result.set_test(condition, measure, size=size)) is not None:
        row |= {"n_sets": test.n_sets, "n_beyond": test.n_beyond, "p_value": test.p_value, "decided": test.decided}
    return row


def has_control(result: Any, condition: str, size: float, measure: str) -> bool:
    """Whether the control of a result was measured for a condition and size.

    Args:
        result: The trials.
        condition: One of its tested conditions.
        size: One of its sizes.
        measure: One of the measures.
    """
    chosen = [
        trial
        for trial in result.trials
        if (trial.condition, trial.size) == (result.control, size) and trial.matched in ("", condition)
    ]
    return bool(chosen) and all(measure in trial.values for trial in chosen)


def sized(result: Any, size: float) -> str:
    """A size with the name of what it counts, as in "1 head" or "40%".

    Args:
        result: The trials.
        size: The size.
    """
    if result.size_name.startswith("share"):
        return f"{size:.0%}"
    name = result.size_name.removesuffix("s") if size == 1 else result.size_name
    return f"{size:g} {name}"
