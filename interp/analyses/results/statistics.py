"""Statistics of results: means with bootstrap intervals, and paired differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

N_RESAMPLES = 1000
"""bootstrap resamples of an interval"""
Rows = Sequence[Sequence[float | bool]]
"""one row of numbers a draw, one number a prompt"""


class Estimate(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def bootstrap(rows: Rows, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean over draws and prompts, both resampled.

    Args:
        rows: Numbers `[r n]`: one row for each draw of heads, one column for each prompt.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The lower and the upper end.
    """
    values = torch.tensor(rows, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    r, n = values.shape
    means = torch.stack(
        [
            values[torch.randint(r, (r,), generator=generator)][:, torch.randint(n, (n,), generator=generator)].mean()
            for _ in range(n_resamples)
        ]
    )
    return _ends(means, level)


def mean_over_draws(rows: Rows, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Estimate:
    """Mean over draws and prompts with its interval, see `bootstrap`.

    Args:
        rows: Numbers `[r n]`: one row for each draw, one column for each prompt.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        Estimate: mean, low, high.
    """
    return Estimate(sum(map(sum, rows)) / sum(map(len, rows)), *bootstrap(rows, level, n_resamples, seed))


def paired_difference(
    one: Rows, other: Rows, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean over prompts of one side minus the other, each prompt with itself, and its percentile interval.

    Rows of a side are averaged first, and prompts are resampled.

    Args:
        one: Numbers `[r n]` of one condition.
        other: Numbers `[s n]` of the other, on the same prompts.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        Estimate: mean, low, high.
    """
    first, second = (torch.tensor(rows, dtype=torch.float64).mean(0) for rows in (one, other))
    return mean_over_prompts((first - second), level, n_resamples, seed)


def mean_over_prompts(values: Tensor, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of one number a prompt and its percentile interval, in the precision of the numbers.

    Args:
        values: `[n]`, one number for each prompt.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        Estimate: mean, low, high.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (n_resamples, len(values)), generator=generator)
    return Estimate(float(values.mean()), *_ends(values[chosen].mean(1), level))


def pooled_mean(rows: Rows, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of the rows' means and its percentile interval, each row resampled within itself.

    Args:
        rows: One row for each task, whose prompts are its numbers; every task has the same weight.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        Estimate: mean, low, high.
    """
    values = [torch.tensor(row, dtype=torch.float64) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    means = [row[torch.randint(len(row), (n_resamples, len(row)), generator=generator)].mean(1) for row in values]
    return Estimate(
        float(torch.stack([row.mean() for row in values]).mean()), *_ends(torch.stack(means).mean(0), level)
    )


def column_intervals(
    values: Tensor, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0, max_elements: int = 4_000_000
) -> Tensor:
    """Percentile bootstrap of the mean of every column over its rows.

    Bit-equal in any process, with any number of threads. NaN where a row does not count, and for a column with fewer
    than two rows that count, since one prompt says nothing about prompts.

    Args:
        values: `[n x]`, NaN where a row does not count for a column.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        max_elements: Bootstrap means held in memory at once.

    Returns:
        `[2 x]` float32: lower and upper ends.
    """
    counted = values[(~values.isnan()).any(1)]
    ends = torch.full((2, values.shape[1]), torch.nan, dtype=torch.float32)
    if len(counted) > 1:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(counted), (n_resamples, len(counted)), generator=generator)
        weights = torch.zeros(n_resamples, len(counted), dtype=torch.float64)
        weights.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        width = max(max_elements // n_resamples, 1)
        for start in range(0, values.shape[1], width):
            part = counted[:, start : start + width]
            found = torch.nanquantile(weighted_means(weights, part), tails, dim=0)
            ends[:, start : start + width] = found.masked_fill((~part.isnan()).sum(0) < 2, torch.nan).float()
    return ends


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


def _ends(means: Tensor, level: float) -> tuple[float, float]:
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)
    low, high = torch.quantile(means, tails).tolist()
    return low, high
