"""Means and differences with their intervals, whose unit is the prompt, the draw of random heads, or both."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp.analyses.results.statistics import weighted_means

N_RESAMPLES = 1000
"""bootstrap resamples of an interval"""
MAX_RESAMPLES = 10_000
"""bootstrap resamples at most, of intervals that hold together"""
MIN_BOOTSTRAP_PROMPTS = 20
"""number of prompts from which on intervals are bootstrapped"""
Rows = Sequence[Sequence[float | bool]]
"""one row of numbers a draw, one number a prompt"""


class Estimate(NamedTuple):
    """A mean and the ends of its interval; the ends are NaN where the numbers do not determine an interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


class Bounds(NamedTuple):
    """The least and the largest value that a number can have."""

    low: float
    high: float


SHARE, SHARE_DIFFERENCE = Bounds(0.0, 1.0), Bounds(-1.0, 1.0)


def together(n: int, level: float = 0.95) -> dict[str, Any]:
    """The level and the resamples of n intervals that all hold together, by Bonferroni's correction.

    Args:
        n: Number of intervals.
        level: Coverage of all of them together.

    Returns:
        Arguments `level` and `n_resamples` of the functions of this module.
    """
    each = 1 - (1 - level) / n
    # the percentiles of a higher level are among fewer resamples
    return {"level": each, "n_resamples": min(N_RESAMPLES * n, MAX_RESAMPLES)}


def bounds_of(values: Tensor) -> Bounds | None:
    """The bounds 0 and 1 where all numbers lie between them, else None.

    Args:
        values: Numbers of any shape, NaN where one does not count.
    """
    counted = values[~values.isnan()]
    return SHARE if len(counted) and bool(((counted >= 0) & (counted <= 1)).all()) else None


def bootstrap(rows: Rows, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean over draws and prompts, by a bootstrap that resamples both.

    The percentiles are widened as in `mean_interval`, for the smaller of the two numbers that are above 1.

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
    draws, prompts = (_resample_weights(count, n_resamples, generator) for count in (r, n))
    means = torch.einsum("sr,rn,sn->s", draws, values, prompts)
    return _ends(means, _widened(level, min(count for count in (r, n, N_RESAMPLES) if count > 1)))


def mean_over_draws(
    rows: Rows, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0, bounds: Bounds | None = None
) -> Estimate:
    """Mean over draws and prompts with its interval, see `bootstrap`; a single draw has the interval of its prompts.

    Args:
        rows: Numbers `[r n]`: one row for each draw, one column for each prompt.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        bounds: Least and largest possible value of a number, where there are such.

    Returns:
        Estimate: mean, low, high.
    """
    values = torch.tensor(rows, dtype=torch.float64)
    over_prompts = mean_interval(values.mean(0), level, n_resamples, seed, bounds)
    if len(values) == 1 or values.shape[1] == 1 or _equal(values.min(), values.max()):
        return over_prompts
    return _clipped(Estimate(over_prompts.mean, *bootstrap(rows, level, n_resamples, seed)), bounds)


def paired_difference(
    one: Rows,
    other: Rows,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    bounds: Bounds | None = None,
) -> Estimate:
    """Mean over prompts of one side minus the other, each prompt with itself, and its interval.

    Several draws of a side are resampled together with the prompts.

    Args:
        one: Numbers `[r n]` of one condition.
        other: Numbers `[s n]` of the other, on the same prompts.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        bounds: Least and largest possible difference, where there are such.

    Returns:
        Estimate: mean, low, high.
    """
    first, second = (torch.tensor(rows, dtype=torch.float64) for rows in (one, other))
    over_prompts = mean_interval(first.mean(0) - second.mean(0), level, n_resamples, seed, bounds)
    least = min((len(side) for side in (first, second) if len(side) > 1), default=0)
    if not least or first.shape[1] == 1:
        return over_prompts
    generator = torch.Generator().manual_seed(seed)
    prompts = _resample_weights(first.shape[1], n_resamples, generator)
    sides = [
        torch.einsum("sr,rn,sn->s", _resample_weights(len(side), n_resamples, generator), side, prompts)
        for side in (first, second)
    ]
    ends = _ends(sides[0] - sides[1], _widened(level, min(least, first.shape[1])))
    # resampling draws as well cannot make the interval narrower
    low, high = min(ends[0], over_prompts.low), max(ends[1], over_prompts.high)
    return _clipped(Estimate(over_prompts.mean, low, high), bounds)


def mean_interval(
    values: Tensor,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    bounds: Bounds | None = None,
) -> Estimate:
    """Mean of one number a prompt and its interval.

    - Counts, which are shares of 0 or 1: the exact interval of Clopper and Pearson.
    - Differences of two counts, which are -1, 0 or 1: the interval of Bonett and Price, which reaches 0 where the exact
      test of McNemar does not reject.
    - Fewer than 20 prompts: Student's t. The percentile bootstrap of so few is too narrow.
    - Others: the percentile bootstrap, widened by `sqrt(n / (n - 1))` and to the quantiles of Student's t.
    - Equal numbers: `1 - ((1 - level) / 2)^(1 / n)`, the largest share of prompts that could differ unseen, is moved to
      the bounds; NaN without bounds.

    The interval of one prompt is NaN, except that of a count.

    Args:
        values: `[n]`, one number for each prompt.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        bounds: Least and largest possible value of a number, where there are such.

    Returns:
        Estimate: mean, low, high.

    Source:
        Clopper and Pearson 1934; Bonett and Price 2012; Hesterberg 2015 (widened percentiles).
    """
    from scipy.stats import t

    values = values.double()
    n, mean = len(values), float(values.mean())
    if bounds is not None and bool(((values == bounds.low) | (values == 0) | (values == bounds.high)).all()):
        if bounds == SHARE:
            return Estimate(mean, *count_interval(int(values.sum()), n, level))
        if bounds == SHARE_DIFFERENCE and n > 1:
            return _difference_of_counts(int((values > 0).sum()), int((values < 0).sum()), n, level)
    if n < 2 or bool(_equal(values.min(), values.max())):
        return Estimate(mean, *_ends_of_equal(mean, n, level, bounds))
    if n < MIN_BOOTSTRAP_PROMPTS:
        half = float(t.ppf((1 + level) / 2, n - 1) * values.std() / math.sqrt(n))
        return _clipped(Estimate(mean, mean - half, mean + half), bounds)
    generator = torch.Generator().manual_seed(seed)
    means = _resample_weights(n, n_resamples, generator) @ values
    return _clipped(Estimate(mean, *_ends(means, _widened(level, n))), bounds)


def count_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of Clopper and Pearson of a share.

    Args:
        successes: Number of successes.
        n: Number of trials.
        level: Coverage of the interval.

    Returns:
        The lower and the upper end.
    """
    from scipy.stats import binomtest

    found = binomtest(successes, n).proportion_ci(level)
    return float(found.low), float(found.high)


def mcnemar_p_value(more: int, fewer: int) -> float:
    """The p-value of the exact test of McNemar.

    `p = 2 P(X <= min(more, fewer))` for `X` binomial with `more + fewer` trials of probability 1/2, at most 1.

    Args:
        more: Number of pairs in which the first side succeeds and the second fails.
        fewer: Number of pairs in which the second side succeeds and the first fails.

    Returns:
        The p-value.
    """
    from scipy.stats import binomtest

    return float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def _difference_of_counts(more: int, fewer: int, n: int, level: float) -> Estimate:
    from scipy.stats import norm

    first, second = (more + 1) / (n + 2), (fewer + 1) / (n + 2)
    half = float(norm.ppf((1 + level) / 2)) * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    low, high = max(first - second - half, -1.0), min(first - second + half, 1.0)
    if mcnemar_p_value(more, fewer) > 1 - level:
        low, high = min(low, 0.0), max(high, 0.0)
    return Estimate((more - fewer) / n, low, high)


def pooled_mean(
    rows: Rows, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0, bounds: Bounds | None = None
) -> Estimate:
    """Mean of the rows' means and its interval, each row resampled within itself.

    Where a row has fewer than 20 numbers, the interval is Student's t with the degrees of freedom of Welch and
    Satterthwaite.

    Args:
        rows: One row for each task, whose prompts are its numbers; every task has the same weight.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        bounds: Least and largest possible value of a number, where there are such.

    Returns:
        Estimate: mean, low, high.
    """
    values = [torch.tensor(row, dtype=torch.float64) for row in rows]
    if len(values) == 1:
        return mean_interval(values[0], level, n_resamples, seed, bounds)
    mean = float(torch.stack([row.mean() for row in values]).mean())
    if min(map(len, values)) < 2 or all(bool(_equal(row.min(), row.max())) for row in values):
        ends = [mean_interval(row, level, n_resamples, seed, bounds)[1:] for row in values]
        return Estimate(mean, *(sum(side) / len(side) for side in zip(*ends, strict=True)))
    if min(map(len, values)) < MIN_BOOTSTRAP_PROMPTS:
        half = _pooled_half(values, level)
        return _clipped(Estimate(mean, mean - half, mean + half), bounds)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([_resample_weights(len(row), n_resamples, generator) @ row for row in values])
    return _clipped(Estimate(mean, *_ends(means.mean(0), _widened(level, min(map(len, values))))), bounds)


def _pooled_half(rows: Sequence[Tensor], level: float) -> float:
    """Half of the width of Student's t interval of the mean of several means."""
    from scipy.stats import t

    errors = torch.stack([row.var() / len(row) for row in rows])
    freedom = errors.sum() ** 2 / sum(error**2 / (len(row) - 1) for error, row in zip(errors, rows, strict=True))
    return float(t.ppf((1 + level) / 2, float(freedom)) * errors.sum().sqrt() / len(rows))


def column_intervals(
    values: Tensor,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    max_elements: int = 4_000_000,
    bounds: Bounds | None = None,
) -> Tensor:
    """Interval of the mean of every column over its rows, as in `mean_interval`.

    Bit-equal in any process, with any number of threads. NaN where a row does not count, and for a column with fewer
    than two rows that count, since one prompt says nothing about prompts.

    Args:
        values: `[n x]`, NaN where a row does not count for a column.
        level: Coverage of the interval.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        max_elements: Bootstrap means held in memory at once.
        bounds: Least and largest possible value of a number, where there are such.

    Returns:
        `[2 x]` float32: lower and upper ends.
    """
    counted = values[(~values.isnan()).any(1)].double()
    ends = torch.full((2, values.shape[1]), torch.nan, dtype=torch.float64)
    if len(counted) < 2:
        return ends.float()
    ns = (~counted.isnan()).sum(0)
    means = weighted_means(torch.ones(1, len(counted), dtype=torch.float64), counted)[0]
    if len(counted) >= MIN_BOOTSTRAP_PROMPTS:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(counted), (n_resamples, len(counted)), generator=generator)
        weights = torch.zeros(n_resamples, len(counted), dtype=torch.float64)
        weights.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
        width = max(max_elements // n_resamples, 1)
        tails = torch.tensor(_tails(_widened(level, len(counted))), dtype=torch.float64)
        for start in range(0, values.shape[1], width):
            part = counted[:, start : start + width]
            ends[:, start : start + width] = torch.nanquantile(weighted_means(weights, part), tails, dim=0)
    few = (ns < MIN_BOOTSTRAP_PROMPTS) & (ns > 1)
    if bool(few.any()):
        ends[:, few] = _t_ends(counted[:, few], means[few], ns[few], level)
    least, largest = counted.nan_to_num(nan=math.inf).amin(0), counted.nan_to_num(nan=-math.inf).amax(0)
    ends = ends.masked_fill(ns < 2, torch.nan)
    if bounds is not None:
        ends = ends.clamp(*bounds)
    for column in (_equal(least, largest) & (ns > 1)).nonzero().flatten().tolist():
        ends[:, column] = torch.tensor(_ends_of_equal(float(means[column]), int(ns[column]), level, bounds))
    return ends.float()


def _t_ends(values: Tensor, means: Tensor, ns: Tensor, level: float) -> Tensor:
    """Ends of the intervals of Student's t, `[2 x]`, from values `[n x]` with NaN where a row does not count."""
    from scipy.stats import t

    squares = (values - means).square().nan_to_num(nan=0.0).sum(0) / (ns - 1)
    half = torch.from_numpy(t.ppf((1 + level) / 2, (ns - 1).numpy())) * (squares / ns).sqrt()
    return torch.stack([means - half, means + half])


def _ends_of_equal(mean: float, n: int, level: float, bounds: Bounds | None) -> tuple[float, float]:
    """Ends for equal numbers: unseen prompts, of the largest share that fits, are at the bounds."""
    if bounds is None or n < 2:
        return math.nan, math.nan
    unseen = 1 - ((1 - level) / 2) ** (1 / n)
    return mean - unseen * (mean - bounds.low), mean + unseen * (bounds.high - mean)


def _resample_weights(n: int, n_resamples: int, generator: torch.Generator) -> Tensor:
    """Weights `[s n]` of the numbers in each resample; the weights of a resample sum to 1."""
    chosen = torch.randint(n, (n_resamples, n), generator=generator)
    weights = torch.zeros(n_resamples, n, dtype=torch.float64)
    return weights.scatter_add_(1, chosen, torch.full_like(chosen, 1, dtype=torch.float64)) / n


def _widened(level: float, n: int) -> float:
    """The level whose percentiles of the bootstrap are as wide as Student's t for n numbers."""
    from scipy.stats import norm, t

    return float(2 * norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 + level) / 2, n - 1)) - 1)


def _equal(least: Tensor, largest: Tensor) -> Tensor:
    """Whether numbers differ by no more than the rounding of float64."""
    return largest - least <= 1e-12 * torch.maximum(least.abs(), largest.abs())


def _clipped(found: Estimate, bounds: Bounds | None) -> Estimate:
    if bounds is None:
        return found
    return Estimate(found.mean, max(found.low, bounds.low), min(found.high, bounds.high))


def _tails(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2


def _ends(means: Tensor, level: float) -> tuple[float, float]:
    low, high = torch.quantile(means, torch.tensor(_tails(level), dtype=means.dtype)).tolist()
    return low, high
