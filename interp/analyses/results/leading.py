"""The heads that lead a table or the tables of a run, and how many heads are above a threshold."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from interp.analyses.results import table_statistics
from interp.hooks.model.heads import Head

if TYPE_CHECKING:
    from interp.analyses.results.head_scores import HeadScores

N_STEPS = 20
"""steps of a threshold curve between 0 and the highest score"""


class LeadingHead(NamedTuple):
    """A head of the top of a table."""

    head: Head
    value: float
    """score over all prompts"""
    low: float
    """lower end of the 95 % interval"""
    high: float
    """upper end of the 95 % interval"""
    held_out: float
    """mean on one half of the prompts of the head that the other half picks for this rank; NaN for one prompt"""
    top_share: float
    """share of the bootstrap resamples in which the head is in the list; NaN for fewer than two prompts"""


class Count(NamedTuple):
    """A point of a threshold curve."""

    threshold: float
    above: int
    """heads with a higher score"""
    confident: int
    """heads that are above the threshold with a false discovery rate of at most 5 %"""


def leading(scores: "HeadScores", k: int) -> tuple[LeadingHead, ...]:
    """The first heads of a table with their held-out scores and the stability of their rank.

    Args:
        scores: The table.
        k: Number of heads.

    Returns:
        The heads, see `HeadScores.leading`.
    """
    heads, columns = scores.top(k), scores.per_prompt.flatten(1)
    if not heads:
        return ()
    held_out = table_statistics.held_out_means(columns, len(heads), seed=scores.seed).tolist()
    shares = table_statistics.top_shares(columns, k, seed=scores.seed).view_as(scores.values)
    return tuple(
        LeadingHead(
            head, scores[head], float(scores.low[head]), float(scores.high[head]), estimate, float(shares[head])
        )
        for head, estimate in zip(heads, held_out, strict=True)
    )


def threshold_curve(scores: "HeadScores", thresholds: Sequence[float] | None = None) -> tuple[Count, ...]:
    """How many heads of a table are above each of several thresholds.

    Args:
        scores: The table.
        thresholds: The thresholds, see `HeadScores.threshold_curve`.

    Returns:
        The counts at each threshold.
    """
    if thresholds is None:
        highest = max(0.0, float(scores.values.nan_to_num(0.0).max()))
        known = {highest * step / N_STEPS for step in range(1, N_STEPS)} | {scores.threshold or 0.0}
        thresholds = sorted(threshold for threshold in known if 0 < threshold < highest)
    return tuple(
        Count(threshold, int((scores.values > threshold).sum()), len(scores.confident(threshold)))
        for threshold in thresholds
    )


def leading_heads(scores: Mapping[str, "HeadScores"], per_table: int = 3, n_heads: int = 12) -> list[Head]:
    """The first head of each table, then the second of each, and so on, without doubles.

    Args:
        scores: Tables by the name of their analysis.
        per_table: Number of heads taken from each table; heads at the floor of a table are never taken.
        n_heads: Number of heads at most.

    Returns:
        The heads.
    """
    tops = [table.top(per_table) for table in scores.values()]
    ranked = [top[place] for place in range(per_table) for top in tops if place < len(top)]
    return list(dict.fromkeys(ranked))[:n_heads]
