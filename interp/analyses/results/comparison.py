"""The agreement of two tables of head scores."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.analyses.results import statistics, table_statistics
from interp.errors import ScoreError, UsageError
from interp.hooks.model.heads import Head

if TYPE_CHECKING:
    from interp.analyses.results.head_scores import HeadScores


@dataclass(frozen=True)
class Comparison:
    """How far two tables of head scores agree."""

    spearman: float
    """rank correlation over heads; NaN where a table is constant"""
    pearson: float
    """correlation over heads; NaN where a table is constant"""
    overlap: int
    """number of heads in the top k of both"""
    expected_overlap: float
    """overlap of two random lists of heads: product of their lengths / heads"""
    expected_within_layers: float
    """overlap of two random lists with as many heads of each layer as these"""
    p_overlap: float
    """probability of at least this overlap if heads are permuted within their layers; NaN where a list is empty"""
    depth_overlap: float
    """overlap of the first list with the depth profile of the second table, in which each head scores its layer's mean;
    heads of one layer are in random order"""
    k: int
    """length of the lists"""
    lengths: tuple[int, int] = (0, 0)
    """heads in the two lists: k, or fewer where a table ranks fewer"""
    shared: tuple[Head, ...] = ()
    """the heads in both lists"""

    def __str__(self) -> str:
        p = "no p, since a list is empty" if self.p_overlap != self.p_overlap else f"p = {self.p_overlap:.2g}"
        return (
            f"Spearman {self.spearman:.2f}; {self.overlap} of the top {self.k} shared; by chance "
            f"{self.expected_overlap:.2f} over all heads and {self.expected_within_layers:.2f} within layers ({p}); "
            f"{self.depth_overlap:.2f} with the depth profile of the second table"
        )


def compare(one: "HeadScores", other: "HeadScores", k: int) -> Comparison:
    """Correlations and overlap of two tables, see `HeadScores.compare`.

    Args:
        one: The first table.
        other: A table of the same shape.
        k: Length of the lists that overlap.

    Returns:
        Comparison: the agreement of the tables.

    Raises:
        ScoreError: If the tables differ in shape.
        UsageError: If k is not between 1 and the number of heads that both score.
    """
    if one.values.shape != other.values.shape:
        raise ScoreError(
            f"'{one.name}' has {one.layers}x{one.n_heads} heads and '{other.name}' has "
            f"{other.layers}x{other.n_heads}; compare tables of one shape."
        )
    both = ~(one.values.isnan() | other.values.isnan())
    n = int(both.sum())
    if not 1 <= k <= n:
        raise UsageError(f"k={k} for {n} scored heads; give a k from 1 to {n}.")
    tops = [[head for head in table.top(len(table)) if both[head]][:k] for table in (one, other)]
    sizes = both.sum(1).tolist()
    mine, theirs = (_by_layer(top, one.layers) for top in tops)
    shared = tuple(head for head in tops[0] if head in set(tops[1]))
    p = table_statistics.overlap_p_value(mine, theirs, sizes, len(shared)) if all(tops) else float("nan")
    profile = _depth_list(other.values.where(both, torch.nan), k)
    return Comparison(
        spearman=table_statistics.rank_correlation(one.values.flatten(), other.values.flatten()),
        pearson=statistics.correlation(one.values[both].double(), other.values[both].double()),
        overlap=len(shared),
        expected_overlap=len(tops[0]) * len(tops[1]) / n,
        expected_within_layers=table_statistics.expected_overlap(mine, theirs, sizes),
        p_overlap=p,
        depth_overlap=table_statistics.expected_overlap(mine, profile, sizes),
        k=k,
        lengths=(len(tops[0]), len(tops[1])),
        shared=shared,
    )


def _by_layer(heads: list[Head], layers: int) -> list[int]:
    return torch.bincount(torch.tensor([head.layer for head in heads], dtype=torch.int64), minlength=layers).tolist()


def _depth_list(values: Tensor, k: int) -> list[float]:
    """Number of heads of each layer among the first k, if each head scores the mean of its layer."""
    sizes, means = (~values.isnan()).sum(1), values.double().nanmean(1)
    found, left = [0.0] * len(sizes), float(k)
    for layer in means.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist():
        found[layer] = min(left, float(sizes[layer]))
        left -= found[layer]
    return found
