"""Items on which the unmodified model shows a behaviour: tests of heads use these, and results state their number."""

from collections.abc import Iterable, Mapping
from typing import Any

ACCURACY = "accuracy"
"""measure of right answers"""
COUNTED = "counted"
"""setting of trials: measure -> [items on which the unmodified model shows the behaviour, all items]"""


def sentences_of_counted(settings: Mapping[str, Any], n_used: Mapping[str, int]) -> list[str]:
    """How many items show the behaviour of each measure; empty where all do, or none is needed.

    Args:
        settings: Settings of the trials.
        n_used: Measure -> number of items that were used.
    """
    found = []
    for measure, (shown, n) in settings.get(COUNTED, {}).items():
        used = n_used.get(measure, shown)
        states = "The unmodified model answers {} of {} prompts right"
        if measure != ACCURACY:
            states = f"Measured by {measure}, the unmodified model shows the behaviour on {{}} of {{}} prompts"
        if not shown:
            found.append(f"{states.format('none', n)}, so nothing is stated about heads.")
        elif used < n:
            which = "these" if used == shown else f"the first {used} of these"
            found.append(f"{states.format(shown, n)}; {which} are used.")
    return found


def n_items(trials: Iterable[Any]) -> dict[str, int]:
    """The number of items of each measure of trials.

    Args:
        trials: The trials.
    """
    return {measure: len(values) for trial in trials for measure, values in trial.values.items()}
