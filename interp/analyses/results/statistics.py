"""Statistics of tables of heads: weighted means and correlations."""

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
