"""Analyses compared: heads that several tables share, and two tables against each other."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from interp import plots
from interp.analyses.results.comparison import Comparison
from interp.analyses.results.head_scores import HeadScores
from interp.report.page import Page, RenderedFigure

N_TOP = 10
"""heads of each table that are compared"""


def compared(scores: Mapping[str, HeadScores], page: Page) -> dict[str, Any] | None:
    """The context of the section "Analyses compared"; None for fewer than two tables.

    Args:
        scores: Score tables by name.
        page: The page, to which figures are added.
    """
    if len(scores) < 2:
        return None
    tops = {name: set(table.top(N_TOP)) for name, table in scores.items()}
    shared = [(head, [name for name in tops if head in tops[name]]) for head in sorted(set.union(*tops.values()))]
    return {
        "top": N_TOP,
        "depth": page.figure(plots.depth(scores)) if any(_is_share(table) for table in scores.values()) else None,
        "scatter": _scatter(scores, page),
        "names": [plots.title_of(name) for name in tops],
        "rows": [[None if one == other else _agreement(scores[one], scores[other]) for other in tops] for one in tops],
        "shared": [(head, [plots.title_of(name) for name in names]) for head, names in shared if len(names) > 1],
    }


def _scatter(scores: Mapping[str, HeadScores], page: Page) -> RenderedFigure | None:
    """The first two analyses that score the same heads, against each other."""
    for one, other in combinations(scores, 2):
        n_common = _n_common(scores[one], scores[other])
        if n_common > 1:
            return page.figure(plots.scatter(scores[one], scores[other], min(N_TOP, n_common)))
    return None


def _agreement(one: HeadScores, other: HeadScores) -> Comparison | None:
    """The overlap of two tables with what is expected by chance; None where they score no head in common."""
    n_common = _n_common(one, other)
    return one.compare(other, min(N_TOP, n_common)) if n_common else None


def _n_common(one: HeadScores, other: HeadScores) -> int:
    return int((~(one.values.isnan() | other.values.isnan())).sum())


def _is_share(table: HeadScores) -> bool:
    known = table.values[~table.values.isnan()]
    return bool(len(known)) and float(known.min()) >= 0 and float(known.max()) <= 1
