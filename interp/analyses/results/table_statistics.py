"""Statistics of a table of heads: heads above a threshold, stability of their order, agreement of two orders."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.analyses.results.intervals import N_RESAMPLES
from interp.analyses.results.statistics import correlation, weighted_means

N_SPLITS = 50
"""random splits of the prompts into halves"""
FLOOR_SHARE = 0.1
"""share of the heads that makes their common value the floor of a table"""
_N_NODES, _N_STEPS = 96, 60
"""points of an integral, and steps that halve an interval"""
_N_FACTORS = 32
"""factors whose product is far from the largest float"""


def p_values_above(values: Float[Tensor, "n x"], threshold: float) -> Float[Tensor, "x"]:
    """The p-values of the hypothesis that the true mean of a column is at most a threshold, against a higher mean.

    In a table without negative numbers the test is Gaffke's: `p = P(sum over i of w_i x_i <= threshold)`, where the
    weights of the prompts and of one further prompt with the score 0 are uniform on the simplex. For scores of 0 and 1
    this is the exact binomial (Clopper-Pearson) test, so n prompts with the score 1 have `p = threshold^n`. In a table
    with negative numbers it is Student's t test, and a column without spread has the p-value 1.

    Args:
        values: Numbers `[n x]`, NaN where a prompt does not count for a column.
        threshold: The largest mean under the hypothesis.

    Returns:
        Float64 p-values `[x]`; 1 for a column with a mean of at most the threshold, NaN for one without a counted
        prompt.

    Source:
        Gaffke 2005, Mathematical Methods of Statistics 14(4); Learned-Miller and Thomas 1905.06208.

    Limits:
        That Gaffke's test keeps its level for all distributions is a conjecture without a known exception. Student's t
        test needs means that are nearly normal.
    """
    numbers = values.double()
    counts = (~numbers.isnan()).sum(0)
    means = numbers.nanmean(0)
    p = torch.ones_like(means).masked_fill(counts == 0, torch.nan)
    above = means > threshold
    if above.any():
        known = numbers[~numbers.isnan()]
        test = _gaffke if float(known.min()) >= 0 else _student
        p[above] = test(numbers[:, above], threshold)
    return p


def _gaffke(values: Float[Tensor, "n x"], threshold: float) -> Float[Tensor, "x"]:
    """`P(sum of E_i (x_i - threshold) <= 0)` for standard exponential E_i, by an integral along steepest descent.

    Weights that are uniform on the simplex are exponential variables over their sum. The Laplace transform of the sum
    is the product of `1 / (1 + t d_i)`, and its inverse at 0 is an integral over t along a vertical line.
    """
    if threshold <= 0:
        # a positive mean of numbers of at least 0 refutes a mean of 0
        return torch.zeros(values.shape[1], dtype=torch.float64)
    # a prompt that does not count has no weight: its factor is 1
    gaps = torch.cat([(values - threshold).nan_to_num(0.0), torch.full_like(values[:1], -threshold)])
    low, high = torch.zeros(gaps.shape[1], dtype=torch.float64), torch.full((gaps.shape[1],), 1 / threshold).double()
    for _ in range(_N_STEPS):
        middle = (low + high) / 2
        falls = -(gaps / (1 + middle * gaps)).sum(0) - 1 / middle < 0
        low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
    start = (low + high) / 2
    # each factor over its value at the start of the line, where the product is largest
    slopes = gaps / (1 + start * gaps)
    width = (slopes.square().sum(0) + start**-2).rsqrt()
    angles, weights = _nodes()
    heights = width[:, None] * angles.tan()
    logs = torch.complex(torch.ones_like(heights), heights / start[:, None]).log()
    for block in slopes.split(_N_FACTORS):
        logs += torch.complex(torch.ones(()).double(), block[..., None] * heights).prod(0).log()
    largest = -(1 + start * gaps).log().sum(0) - start.log()
    steps = width[:, None] / angles.cos().square() * weights
    return (largest.exp() * ((-logs).exp().real * steps).sum(-1) / math.pi).clamp(0.0, 1.0)


def _nodes() -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
    """Points and weights of Gauss and Legendre between 0 and pi / 2."""
    from numpy.polynomial.legendre import leggauss

    points, weights = (torch.from_numpy(each) for each in leggauss(_N_NODES))
    return (points + 1) * math.pi / 4, weights * math.pi / 4


def _student(values: Float[Tensor, "n x"], threshold: float) -> Float[Tensor, "x"]:
    from scipy.stats import t as student

    counts = (~values.isnan()).sum(0)
    means = values.nanmean(0)
    spread = ((values - means).square().nansum(0) / (counts - 1).clamp(min=1)).sqrt()
    # rounding is no spread
    known = (counts > 1) & (spread > 1e-6 * means.abs())
    ratio = (means - threshold) / (spread / counts.sqrt()).where(known, torch.nan)
    found = student.sf(ratio.numpy(), (counts - 1).clamp(min=1).numpy())
    return torch.from_numpy(found).nan_to_num(nan=1.0)


def benjamini_hochberg(p: Float[Tensor, "x"]) -> Float[Tensor, "x"]:
    """Adjusted p-values: of the tests whose value is at most 0.05, at most 5 % on average are false discoveries.

    `q[i] = min over j with p[j] >= p[i] of p[j] * number of tests / rank of p[j]`.

    Args:
        p: p-values `[x]`, NaN where there was no test.

    Returns:
        Adjusted p-values `[x]`, NaN where there was no test.

    Source:
        Benjamini and Hochberg 1995, Journal of the Royal Statistical Society B 57(1).

    Limits:
        Needs tests that are independent or depend positively on each other, as those on the same prompts do.
    """
    adjusted = torch.full_like(p, torch.nan)
    tested = (~p.isnan()).nonzero()[:, 0]
    order = tested[p[tested].argsort(descending=True)]
    ranks = torch.arange(len(order), 0, -1, dtype=p.dtype)
    adjusted[order] = (p[order] * len(order) / ranks).cummin(0).values.clamp(max=1.0) if len(order) else p[order]
    return adjusted


def floors(values: Float[Tensor, "d x"]) -> Float[Tensor, "d"]:
    """The value of each row at or below which heads have no rank; -inf where every head has one.

    The floor is 0 where the row has a 0 and no negative number, or where many heads score exactly 0. Otherwise it is
    the lowest value, if many heads share it. Many are a tenth of the scored heads, and at least two.

    Args:
        values: Scores `[d x]`, NaN for heads without a score.

    Returns:
        The floors `[d]`.
    """
    known = ~values.isnan()
    many = (FLOOR_SHARE * known.sum(1)).clamp(min=2)
    lowest = values.where(known, torch.inf).amin(1)
    zeros, at_lowest = (values == 0).sum(1), (values == lowest[:, None]).sum(1)
    found = torch.where(at_lowest >= many, lowest, -torch.inf)
    return torch.where((zeros >= many) | ((lowest >= 0) & (zeros > 0)), 0.0, found)


def order_of(values: Float[Tensor, "d x"], generator: torch.Generator) -> tuple[Int[Tensor, "d x"], Int[Tensor, "d"]]:
    """Heads of each row by falling score, and how many of them have a rank; ties are in one random order.

    Args:
        values: Scores `[d x]`, NaN for heads without a score.
        generator: Source of the order of ties.

    Returns:
        Places of the heads `[d x]`, and the number of heads above the floor `[d]`.
    """
    shuffled = torch.randperm(values.shape[1], generator=generator)
    above = values > floors(values)[:, None]
    keys = values.nan_to_num(nan=-torch.inf)[:, shuffled]
    return shuffled[keys.sort(dim=1, descending=True, stable=True).indices], above.sum(1)


def split_means(
    values: Float[Tensor, "n x"], n_splits: int = N_SPLITS, seed: int = 0
) -> tuple[Float[Tensor, "s x"], Float[Tensor, "s x"]]:
    """Means of all columns over the two halves of random splits of the prompts that count for any column.

    Args:
        values: Numbers `[n x]`, NaN where a prompt does not count.
        n_splits: Number of splits.
        seed: Seed of the splits.

    Returns:
        The means of the first and of the second halves; no row for fewer than two prompts.
    """
    counted = values[(~values.isnan()).any(1)]
    n, splits = len(counted), n_splits if len(counted) > 1 else 0
    generator = torch.Generator().manual_seed(seed)
    first = torch.zeros(splits, n, dtype=torch.float64)
    for row in first:
        row[torch.randperm(n, generator=generator)[: n // 2]] = 1.0
    if not splits:
        return first.new_zeros(0, values.shape[1]), first.new_zeros(0, values.shape[1])
    return weighted_means(first, counted), weighted_means(1 - first, counted)


def split_half_correlation(values: Float[Tensor, "n x"], n_splits: int = N_SPLITS, seed: int = 0) -> float:
    """Mean rank correlation between the columns' means on the two halves of random splits of the prompts.

    Args:
        values: Numbers `[n x]`, NaN where a prompt does not count.
        n_splits: Number of splits.
        seed: Seed of the splits.

    Returns:
        The correlation; NaN for fewer than two prompts or three columns, or where all columns are equal.
    """
    if values.shape[1] < 3:
        return math.nan
    found = [rank_correlation(*halves) for halves in zip(*split_means(values, n_splits, seed), strict=True)]
    known = [value for value in found if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def rank_correlation(one: Float[Tensor, "x"], other: Float[Tensor, "x"]) -> float:
    """Spearman correlation over the columns that both sides have; equal values share their mean rank.

    Args:
        one: Numbers `[x]`, NaN for none.
        other: Numbers `[x]`, NaN for none.

    Returns:
        The correlation; NaN where a side is constant.
    """
    from scipy.stats import rankdata

    both = ~(one.isnan() | other.isnan())
    return correlation(*(torch.from_numpy(rankdata(side[both].double().numpy())) for side in (one, other)))


def held_out_means(values: Float[Tensor, "n x"], k: int, n_splits: int = N_SPLITS, seed: int = 0) -> Float[Tensor, "k"]:
    """Mean, on prompts that did not choose it, of the head at each place of a ranking.

    The prompts are split in halves at random. Each half ranks the heads, and the head at each place is estimated on
    the other half, both ways. The estimates of all splits are averaged.

    Args:
        values: Numbers `[n x]`, NaN where a prompt does not count.
        k: Number of places.
        n_splits: Number of splits.
        seed: Seed of the splits and of ties.

    Returns:
        Float32 means `[k]`; NaN where no half ranks so many heads, and for fewer than two prompts.

    Limits:
        Half of the prompts choose less well than all of them, so the estimates are slightly too low for heads that all
        prompts choose.
    """
    halves = split_means(values, n_splits, seed)
    chosen_on, estimated_on = torch.cat(halves), torch.cat(halves[::-1])
    places = torch.arange(min(k, values.shape[1]))
    order, ranked = order_of(chosen_on, torch.Generator().manual_seed(seed))
    found = estimated_on.gather(1, order[:, : len(places)]).where(places < ranked[:, None], torch.nan)
    return torch.nn.functional.pad(found.nanmean(0).float(), (0, k - len(places)), value=torch.nan)


def top_shares(
    values: Float[Tensor, "n x"], k: int, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Float[Tensor, "x"]:
    """Share of the bootstrap resamples of the prompts in which each column is among the first k.

    Args:
        values: Numbers `[n x]`, NaN where a prompt does not count.
        k: Length of the list.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling and of ties.

    Returns:
        The shares `[x]`; NaN for fewer than two prompts.
    """
    counted = values[(~values.isnan()).any(1)]
    if len(counted) < 2:
        return torch.full((values.shape[1],), torch.nan)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(counted), (n_resamples, len(counted)), generator=generator)
    weights = torch.zeros(n_resamples, len(counted), dtype=torch.float64)
    weights.scatter_add_(1, chosen, torch.ones_like(weights))
    order, ranked = order_of(weighted_means(weights, counted), generator)
    k = min(k, values.shape[1])
    among = torch.zeros(n_resamples, values.shape[1])
    among.scatter_(1, order[:, :k], (torch.arange(k) < ranked[:, None]).float())
    return among.mean(0)


def overlap_p_value(one: Sequence[int], other: Sequence[int], sizes: Sequence[int], overlap: int) -> float:
    """Probability that two lists share at least so many heads if the heads of each layer are permuted.

    The number of shared heads of a layer is hypergeometric, and the layers are independent. With one layer this is the
    probability under a permutation of all heads.

    Args:
        one: Number of heads of the first list in each layer.
        other: Number of heads of the second list in each layer.
        sizes: Number of ranked heads of each layer.
        overlap: Number of heads that both lists have.

    Returns:
        The exact probability.
    """
    from scipy.stats import hypergeom

    total = torch.ones(1, dtype=torch.float64)
    for mine, theirs, size in zip(one, other, sizes, strict=True):
        if mine and theirs:
            counts = range(min(mine, theirs) + 1)
            layer = torch.tensor([float(hypergeom.pmf(shared, size, mine, theirs)) for shared in counts]).double()
            summed = torch.zeros(len(total) + len(layer) - 1, dtype=torch.float64)
            for shared, probability in enumerate(layer):
                summed[shared : shared + len(total)] += probability * total
            total = summed
    return min(1.0, float(total[overlap:].sum()))


def expected_overlap(one: Sequence[float], other: Sequence[float], sizes: Sequence[int]) -> float:
    """Mean number of heads that two lists share if the heads of each layer are permuted.

    Args:
        one: Number of heads of the first list in each layer.
        other: Number of heads of the second list in each layer.
        sizes: Number of ranked heads of each layer.

    Returns:
        The sum over layers of the product of both numbers, divided by the size of the layer.
    """
    return sum(mine * theirs / size for mine, theirs, size in zip(one, other, sizes, strict=True) if size)
