"""The agreement of two tables of head scores."""

from dataclasses import dataclass


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
    """overlap of two random lists: k^2 / heads"""
    p_overlap: float
    """share of permutations with at least this overlap, (1 + hits) / (1 + n_permutations)"""
    k: int
    """length of the lists"""
