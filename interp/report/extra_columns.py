"""Extras of a score table that a report prints next to the score of the leading heads, such as computed controls."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from interp.analyses import registry
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.model.heads import Head, HeadSet


@dataclass(frozen=True)
class ExtraColumn:
    """One number for each of the leading heads."""

    title: str
    """heading of the column"""
    values: tuple[float, ...]
    """mean over the prompts that count, NaN for none"""
    n_higher: int | None = None
    """for a control: heads whose score is confidently higher, with a controlled false discovery rate"""

    @property
    def words(self) -> str:
        """How many heads exceed a control, in one sentence; "" for an extra that is none."""
        if self.n_higher is None or not self.values:
            return ""
        n, control = len(self.values), f"the control ({self.title[:1].lower()}{self.title[1:]})"
        if not self.n_higher:
            return f"None of the {n} leading heads is distinguishable from {control}: no score is confidently higher."
        verb = "scores" if self.n_higher == 1 else "score"
        which = "all" if self.n_higher == n else f"{self.n_higher}"
        return f"Of the {n} leading heads, {which} {verb} confidently higher than {control}."


def extra_columns(name: str, scores: HeadScores, heads: Sequence[Head]) -> list[ExtraColumn]:
    """The columns that the analysis of a table declares, controls first.

    Args:
        name: Name of the table in the run.
        scores: The table.
        heads: The leading heads.
    """
    entry = registry.find(name.rpartition("/")[2])
    if entry is None:
        return []
    found = []
    for extra, title in {**entry.control_extras, **entry.shown_extras}.items():
        if extra not in scores.extras:
            continue
        means = scores.extras[extra].double().nanmean(0)
        n_higher = None
        if extra in entry.control_extras:
            # corrected over all heads of the table, since the leading ones were chosen by their scores
            difference = replace(scores, per_prompt=scores.per_prompt - scores.extras[extra], extras={})
            n_higher = len(difference.confident(0.0) & HeadSet(tuple(heads)))
        found.append(ExtraColumn(title, tuple(float(means[head]) for head in heads), n_higher))
    return found
