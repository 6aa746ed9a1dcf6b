"""Trials as tables: conditions, conditions by size, prompts, replies."""

import math
from itertools import product
from typing import Any

from interp.analyses.results.intervals import Estimate
from interp.analyses.results.shown_behaviour import ACCURACY
from interp.analyses.results.trial import BASELINE, DRAWN, Trial
from interp.analyses.results.trial_rows import groups, sizes
from interp.analyses.results.trial_tests import counted
from interp.analyses.results.trials import Trials
from interp.report.lists import joined
from interp.report.trials_notes import has_interval, is_ablation
from interp.report.trials_words import gain_text, test_text
from interp.report.words import cut

N_REPLIES, MAX_PROMPTS = 4, 50
"""prompts whose replies are shown, and prompts that are listed"""


def table(result: Trials) -> list[dict[str, Any]]:
    """A row for each condition, task and measure: mean, interval, test and heads. Random head sets share a row.

    Args:
        result: Trials whose tested conditions have one size each.
    """
    rows = []
    for group, task in product(groups(result), result.tasks):
        condition, (size, *_) = group.condition, sizes(result, group)
        trials = [t for t in result.select(condition, size, matched=group.matched) if t.task == task]
        if not trials:
            continue
        sets = len({trial.draw for trial in trials})
        name = f"{group.label} ({_sets(sets)})" if sets > 1 or condition in DRAWN else group.label
        for measure in result.measures:
            values = [value for trial in trials for value in trial.values.get(measure, ())]
            if not values:
                continue
            value = result.mean(condition, measure, size=size, task=task or None, matched=group.matched)
            verdicts = measure in result.shares and all(number in (0, 1) for number in values)
            ends = (number_text(result, measure, end) for end in value[1:])
            rows.append(
                {
                    "condition": ", ".join(part for part in (name, task) if part),
                    "measure": measure,
                    "count": f"{int(sum(values))} of {len(values)}" if verdicts else "",
                    "mean": number_text(result, measure, value.mean),
                    "interval": "" if math.isnan(value.low) or not has_interval(result, measure) else " to ".join(ends),
                    "sets": "" if task or condition not in result.tested else _sets_text(result, condition, measure),
                    "heads": _sets(sets) if sets > 1 else str(trials[0].heads) if len(trials[0].heads) else "",
                }
            )
    return rows


def _sets_text(result: Trials, condition: str, measure: str) -> str:
    """The test of a condition against its random sets in a few words; empty where there is none."""
    test = result.set_test(condition, measure)
    if test is None:
        return ""
    p = f", p = {test.p_value:.2g}" if test.decided and counted(result, measure) else ""
    return f"{test_text(result.claims.get(condition, result.claim), test)}{p}"


def _sets(n: int) -> str:
    return "1 set" if n == 1 else f"{n} sets"


def pivot(result: Trials, measure: str) -> dict[str, Any]:
    """A row for each condition and a column for each size: the mean, and the gain over the control.

    Args:
        result: Trials with several sizes.
        measure: One of its measures.
    """
    rows = result.rows(measure)
    cells = {(row["condition"], row["size"]): row for row in rows}
    columns = sorted({row["size"] for row in rows})
    share = result.size_name.startswith("share")
    apart = result.findings(measure)

    def claim_of(row: dict[str, Any]) -> str:
        return str(result.claims.get(row["condition"], result.claim))

    def cell(condition: str, size: float) -> dict[str, Any] | None:
        row = cells.get((condition, size))
        if row is None:
            return None
        gain = Estimate(row["gain"], row["gain_low"], row["gain_high"]) if "gain" in row else None
        return {
            "mean": number_text(result, measure, row["mean"]),
            "sets": f"{claim_of(row)} than {row['n_beyond']} of {row['n_sets']}" if "n_sets" in row else "",
            "gain": "" if gain is None else gain_text(result, measure, gain, with_unit=False),
            "apart": (condition, size) in apart,
        }

    return {
        "measure": measure,
        "sizes": [f"{size:.0%}" if share else f"{size:g}" for size in columns],
        "size_name": result.size_name,
        "gains": any("gain" in row for row in rows),
        "rows": [
            (condition, [cell(condition, size) for size in columns])
            for condition in dict.fromkeys(row["condition"] for row in rows)
        ],
    }


def by_prompt(result: Trials) -> dict[str, Any] | None:
    """Each prompt under each condition, draws averaged, the highest values of the tested condition first.

    Args:
        result: Trials whose conditions have one size each.

    Returns:
        Columns and rows, or None where the numbers are verdicts, which the replies show, or none of prompts.
    """
    measure = result.measures[0]
    rows: dict[str, list[float]] = {}
    for condition in result.conditions:
        values = [trial.values[measure] for trial in result.select(condition) if measure in trial.values]
        if values and len({len(row) for row in values}) == 1:
            rows[condition] = [sum(column) / len(values) for column in zip(*values, strict=True)]
    n = max((len(row) for row in rows.values()), default=0)
    if n < 2 or any(trial.replies for trial in result.trials) or any(len(row) != n for row in rows.values()):
        return None
    first = next((name for name in result.tested if name in rows), next(iter(rows)))
    order = sorted(range(n), key=lambda place: -rows[first][place])[:MAX_PROMPTS]
    labels = [cut(result.questions[i], 110) if i < len(result.questions) else f"prompt {i + 1}" for i in range(n)]
    return {
        "measure": measure,
        "conditions": list(rows),
        "rows": [(labels[i], [number_text(result, measure, row[i]) for row in rows.values()]) for i in order],
        "left_out": n - len(order),
        "note": _sorting(result, list(rows), first),
    }


def _sorting(result: Trials, conditions: list[str], first: str) -> str:
    """How the prompts of a table are sorted, and which columns are means over random sets."""
    several = [name for name in conditions if len({trial.draw for trial in result.select(name)}) > 1]
    order = f"The prompts are sorted by the column {first}, highest first."
    if not several:
        return order
    columns = f"column {several[0]} holds" if len(several) == 1 else f"columns {joined(several)} hold"
    return f"{order} The {columns} the mean over the random sets."


def replies(result: Trials) -> list[dict[str, Any]]:
    """A few prompts and the replies under each condition, first those whose verdict the tested condition changes.

    Args:
        result: The trials.
    """
    measure = result.measures[0]
    kept, first, tested = _with_replies(result)
    if first is None or tested is None:
        return []
    n = len(first.replies)
    order = sorted(range(n), key=lambda i: first.values[measure][i] == tested.values[measure][i])
    shown = []
    for i in order[:N_REPLIES]:
        rows = [
            (trial.condition, trial.values[measure][i] > 0, cut(trial.replies[i].strip()))
            for trial in kept
            if len(trial.replies) == n
        ]
        shown.append(
            {
                "number": i,
                "question": result.questions[i] if i < len(result.questions) else "",
                "expected": result.answers[i] if i < len(result.answers) else "",
                "rows": _merged(rows),
            }
        )
    return shown


def replies_words(result: Trials) -> str:
    """The number of prompts whose replies are shown, and their order; empty without replies.

    Args:
        result: The trials.
    """
    _, first, tested = _with_replies(result)
    if first is None or tested is None:
        return ""
    n = len(first.replies)
    shown = f"{N_REPLIES} of {n} prompts are shown" if n > N_REPLIES else f"All {n} prompts are shown"
    if tested is not first:
        shown += f", beginning with those where only one of {first.condition} and {tested.condition} is right"
    words = f"{shown}. Conditions with the same reply share a row."
    if is_ablation(result) and result.measures[0] == ACCURACY and "judge" not in result.settings:
        words += (
            " Right: the reply contains all content words of the expected answer, in order (stricter than the setting "
            "recall of retrieval). A reply ends as soon as it is certain to be right, so right replies may break off "
            "after one more word."
        )
    return words


def _with_replies(result: Trials) -> tuple[list[Trial], Trial | None, Trial | None]:
    """The trials with replies, the baseline among them, and the first tested condition."""
    measure = result.measures[0]
    kept = [trial for trial in result.trials if trial.replies and measure in trial.values]
    first = next((trial for trial in kept if trial.condition == BASELINE), kept[0] if kept else None)
    return kept, first, next((trial for trial in kept if trial.condition in result.tested), first)


def _merged(rows: list[tuple[str, bool, str]]) -> list[tuple[str, bool, str]]:
    """Conditions with equal replies in one row; random head sets are counted."""
    names: dict[tuple[bool, str], dict[str, int]] = {}
    for name, right, reply in rows:
        found = names.setdefault((right, reply), {})
        found[name] = found.get(name, 0) + 1
    return [
        (", ".join(f"{name} ({_sets(n)})" if n > 1 or name in DRAWN else name for name, n in found.items()), *key)
        for key, found in names.items()
    ]


def number_text(result: Trials, measure: str, value: float) -> str:
    """A number of a measure: a share in percent, else with three decimals.

    Args:
        result: The trials.
        measure: One of its measures.
        value: The number.
    """
    if measure in result.shares:
        return f"{value:.0%}"
    return f"{value:.2g}" if 0 < abs(value) < 0.001 else f"{value:.3f}"
