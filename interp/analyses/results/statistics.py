"""Statistics of tables of heads: weighted means, correlations, and the overlap of rankings."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def weighted_means(weights: Float[Tensor, "d n"], values: Float[Tensor, "n x"]) -> Float[Tensor, "d x"]:
    """Weighted mean of every column over the rows that count for it, in float64; NaN weighs nothing.

    Values are first rounded to multiples of a unit so small (2^-52 of the largest possible sum) that every sum is
    exact: the result does not depend on the order of summation.

    Args:
        weights: Weights `[d n]`.
        values: Numbers `[n x]`, NaN where a row does not count.

    Returns:
        The means `[d x]`.
    """
    counts = (~values.isnan()).double()
    filled = values.double().nan_to_num(nan=0.0)
    largest = float(filled.abs().max()) * float(weights.sum(1).max())
    unit = 2.0 ** (math.frexp(largest)[1] - 52) if largest else 1.0
    return (weights @ (filled / unit).round()) * unit / (weights @ counts)


def correlation(one: Float[Tensor, "c"], other: Float[Tensor, "c"]) -> float:
    """Pearson correlation; NaN where either side is constant.

    Args:
        one: Numbers `[c]`.
        other: Numbers `[c]`.

    Returns:
        The correlation.
    """
    varied = len(one) > 1 and one.min() < one.max() and other.min() < other.max()
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1]) if varied else math.nan


def overlap_p_value(
    n_heads: int, k: int, overlap: int, n_permutations: int = 1000, seed: int = 0, max_elements: int = 4_000_000
) -> float:
    """Share of random rankings whose top k share at least `overlap` heads with a fixed top k.

    `p = (1 + hits) / (1 + n_permutations)`.

    Args:
        n_heads: Number of heads that are ranked.
        k: Length of both lists.
        overlap: Heads that both lists hold.
        n_permutations: Number of random rankings.
        seed: Seed of the rankings.
        max_elements: Numbers held in memory at once.

    Returns:
        The p-value.
    """
    random = torch.Generator().manual_seed(seed)
    hits, width = 0, max(max_elements // n_heads, 1)
    for start in range(0, n_permutations, width):
        shuffled = torch.rand(min(width, n_permutations - start), n_heads, generator=random)
        hits += int(((shuffled.topk(k).indices < k).sum(1) >= overlap).sum())
    return (1 + hits) / (1 + n_permutations)
