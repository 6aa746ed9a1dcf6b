"""The heads that lead the tables of a run."""

from collections.abc import Mapping

from interp.analyses.results.head_scores import HeadScores
from interp.hooks.model.heads import Head


def leading_heads(scores: Mapping[str, HeadScores], per_table: int = 3, n_heads: int = 12) -> list[Head]:
    """The first head of each table, then the second of each, and so on, without doubles.

    Args:
        scores: Tables by the name of their analysis.
        per_table: Number of heads taken from each table.
        n_heads: Number of heads at most.
    """
    tops = [table.top(per_table) for table in scores.values()]
    ranked = [top[place] for place in range(per_table) for top in tops if place < len(top)]
    return list(dict.fromkeys(ranked))[:n_heads]
