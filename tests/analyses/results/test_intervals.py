"""Intervals of means and differences against numpy and scipy, by hand, and in null experiments."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from interp.analyses.results import intervals
from interp.analyses.results.intervals import SHARE, SHARE_DIFFERENCE, Bounds, Estimate

RNG = np.random.default_rng(0)
VALUES = RNG.normal(1.0, 2.0, 40)


def test_an_estimate_excludes_zero_where_its_interval_lies_on_one_side():
    assert Estimate(1.0, 0.1, 2.0).excludes_zero
    assert Estimate(-1.0, -2.0, -0.1).excludes_zero
    assert not Estimate(1.0, 0.0, 2.0).excludes_zero
    assert not Estimate(math.nan, math.nan, math.nan).excludes_zero


def test_many_prompts_have_the_percentile_bootstrap_widened_to_students_t():
    n = len(VALUES)
    level = float(2 * stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1)) - 1)
    wanted = stats.bootstrap(
        (VALUES,), np.mean, n_resamples=20_000, confidence_level=level, method="percentile", rng=1
    ).confidence_interval
    spread = VALUES.std() / n**0.5
    for found in (
        intervals.mean_over_draws([VALUES.tolist()], n_resamples=5000),
        intervals.mean_interval(torch.tensor(VALUES), n_resamples=5000),
        intervals.pooled_mean([VALUES.tolist()], n_resamples=5000),
    ):
        assert found.mean == pytest.approx(VALUES.mean(), abs=1e-12)
        assert found.low == pytest.approx(wanted.low, abs=0.1 * spread)
        assert found.high == pytest.approx(wanted.high, abs=0.1 * spread)


@pytest.mark.parametrize("n", [2, 4, 12, 19])
def test_few_prompts_have_students_t(n):
    values = VALUES[:n]
    wanted = stats.ttest_1samp(values, 0).confidence_interval()
    found = intervals.mean_interval(torch.tensor(values))
    assert found[1:] == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    column = intervals.column_intervals(torch.tensor(values)[:, None])
    assert column[:, 0].tolist() == pytest.approx(found[1:], abs=1e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 12), (12, 12), (7, 12), (32, 32), (1, 1)])
def test_counts_have_exact_intervals(right, n):
    values = torch.tensor([1.0] * right + [0.0] * (n - right))
    wanted = stats.binomtest(right, n).proportion_ci(method="exact")
    found = intervals.mean_interval(values, bounds=SHARE)
    assert found == pytest.approx((right / n, wanted.low, wanted.high))
    assert found.high > found.low


@pytest.mark.parametrize(
    ("more", "fewer", "n", "differs"), [(5, 0, 12, False), (6, 0, 12, True), (0, 12, 12, True), (9, 1, 20, True),
                                        (0, 0, 8, False), (4, 4, 50, False), (1, 0, 100, False)]
)  # fmt: skip
def test_differences_of_counts_exclude_zero_where_mcnemar_rejects(more, fewer, n, differs):
    values = torch.tensor([1.0] * more + [-1.0] * fewer + [0.0] * (n - more - fewer))
    found = intervals.mean_interval(values, bounds=SHARE_DIFFERENCE)
    assert found.mean == pytest.approx((more - fewer) / n)
    assert -1 <= found.low < found.high <= 1
    assert found.excludes_zero == differs
    assert differs == (more + fewer > 0 and stats.binomtest(more, more + fewer).pvalue <= 0.05)


@pytest.mark.parametrize(
    ("values", "bounds", "wanted"),
    [
        ([0.5] * 10, SHARE, (0.5, 0.5 - 0.5 * 0.3085, 0.5 + 0.5 * 0.3085)),
        ([0.5] * 10, SHARE_DIFFERENCE, (0.5, 0.5 - 1.5 * 0.3085, 0.5 + 0.5 * 0.3085)),
        ([0.5] * 10, None, (0.5, math.nan, math.nan)),
        ([0.5], SHARE, (0.5, math.nan, math.nan)),
    ],
)
def test_equal_numbers_are_no_certainty(values, bounds: Bounds | None, wanted):
    found = intervals.mean_interval(torch.tensor(values, dtype=torch.float64), bounds=bounds)
    assert found == pytest.approx(wanted, abs=1e-4, nan_ok=True)
    if len(values) > 1:
        column = intervals.column_intervals(torch.tensor(values)[:, None], bounds=bounds)[:, 0]
        assert column.tolist() == pytest.approx(wanted[1:], abs=1e-4, nan_ok=True)


def test_draws_widen_an_interval():
    draws = RNG.normal(size=(9, 1)) * 5
    rows = draws + RNG.normal(size=(9, 50))
    low, high = intervals.bootstrap(rows.tolist())
    narrow = intervals.mean_interval(torch.tensor(rows.mean(0)))
    assert high - low > 3 * (narrow.high - narrow.low)
    assert low < rows.mean() < high
    other = intervals.paired_difference(rows.tolist(), [[0.0] * 50])
    assert other.high - other.low == pytest.approx(high - low, rel=0.2)


def test_differences_are_of_each_prompt_with_itself():
    prompts = RNG.normal(0, 100, 30)
    noise = RNG.normal(size=30)
    found = intervals.paired_difference([(prompts + noise).tolist()], [prompts.tolist()], n_resamples=5000)
    assert found == pytest.approx(intervals.mean_interval(torch.tensor(noise), n_resamples=5000), abs=1e-9)
    back = intervals.paired_difference([prompts.tolist()], [(prompts + noise).tolist()], n_resamples=5000)
    assert back == pytest.approx((-found.mean, -found.high, -found.low), abs=1e-9)
    # every prompt rises by 2, up to rounding: the prompts do not determine an interval
    moved = intervals.paired_difference([(prompts + 2).tolist()], [prompts.tolist()])
    assert moved == pytest.approx((2.0, math.nan, math.nan), nan_ok=True)


def test_every_task_has_the_same_weight():
    rows = [[0.0] * 100, [1.0, 1.0]]
    found = intervals.pooled_mean(rows, bounds=SHARE)
    assert found.mean == 0.5
    assert 0 < found.low < 0.5 < found.high < 1
    tasks = [RNG.normal(0, 1, 50), RNG.normal(3, 4, 30)]
    found = intervals.pooled_mean([row.tolist() for row in tasks], n_resamples=5000)
    assert found.mean == pytest.approx((tasks[0].mean() + tasks[1].mean()) / 2)
    error = math.sqrt(sum(row.var() / len(row) for row in tasks)) / 2
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_few_prompts_of_several_tasks_have_students_t():
    rows = [RNG.normal(1, 1, 5), RNG.normal(2, 3, 9)]
    found = intervals.pooled_mean([row.tolist() for row in rows])
    # the mean of two means is half of the difference of one and the negative of the other
    wanted = stats.ttest_ind(rows[0], -rows[1], equal_var=False).confidence_interval()
    assert found[1:] == pytest.approx((wanted.low / 2, wanted.high / 2), abs=1e-9)


def test_intervals_that_hold_together_are_wider():
    rows, other = [VALUES.tolist()], [[0.0] * len(VALUES)]
    alone, of_ten = (intervals.paired_difference(rows, other, **intervals.together(n)) for n in (1, 10))
    assert alone == intervals.paired_difference(rows, other)
    assert of_ten.low < alone.low < alone.high < of_ten.high
    wanted = stats.ttest_1samp(VALUES, 0).confidence_interval(0.995)
    assert of_ten[1:] == pytest.approx((wanted.low, wanted.high), abs=0.15)


def test_columns_are_resampled_together_and_nan_does_not_count():
    values = torch.tensor(RNG.normal(size=(30, 4)))
    values[3:, 1] = torch.nan
    values[1:, 2] = torch.nan
    values[:, 3] = torch.nan
    found = intervals.column_intervals(values, n_resamples=2000)
    assert found.shape == (2, 4)
    assert found.dtype == torch.float32
    assert found[:, 0].tolist() == pytest.approx(intervals.mean_interval(values[:, 0])[1:], abs=0.06)
    assert found[:, 1].tolist() == pytest.approx(intervals.mean_interval(values[:3, 1])[1:], abs=1e-5)
    # one prompt, or none, has no interval
    assert found[:, 2:].isnan().all()
    # columns that are computed a few at a time are the same
    assert torch.equal(intervals.column_intervals(values, n_resamples=2000, max_elements=2000)[:, :2], found[:, :2])
    assert intervals.column_intervals(values[:1]).isnan().all()


def test_seeds_repeat_and_differ():
    rows = [VALUES.tolist()]
    for function in (intervals.mean_over_draws, intervals.pooled_mean):
        assert function(rows, seed=3) == function(rows, seed=3)
        assert function(rows, seed=3)[1:] != function(rows, seed=4)[1:]


NULLS = {
    "normal": lambda random, n: (random.normal(size=n), None),
    "skewed": lambda random, n: (random.gamma(4.0, size=n) - 4.0, None),
    "difference of counts": lambda random, n: (random.binomial(1, 0.5, n) - random.binomial(1, 0.5, n), "difference"),
    "share difference": lambda random, n: (random.beta(2, 2, n) - random.beta(2, 2, n), "difference"),
}


@pytest.mark.parametrize("n", [4, 8, 16, 50])
@pytest.mark.parametrize("kind", NULLS)
def test_a_true_zero_is_excluded_in_at_most_six_percent(kind, n):
    random, hits, power, trials, powered = np.random.default_rng(n), 0, 0, 2000 if n < 20 else 1000, 200
    for seed in range(trials):
        values, of = NULLS[kind](random, n)
        bounds = SHARE_DIFFERENCE if of else None
        values = torch.tensor(values, dtype=torch.float64)
        hits += intervals.mean_interval(values, n_resamples=400, seed=seed, bounds=bounds).excludes_zero
        if seed < powered:
            # something is there: a shift by 1.5 standard deviations; of shares, all that can rise rises
            there = values + 1.5 * values.std() if of is None else (values + 0.9).clamp(-1, 1).round(decimals=12)
            power += intervals.mean_interval(there, n_resamples=400, seed=seed, bounds=bounds).excludes_zero
    print(f"{kind}, n={n}: false positives {hits / trials:.1%}, power {power / powered:.0%}")
    # Student's t is not exact for skewed numbers
    assert hits / trials <= (0.06 if kind != "skewed" else 0.075)
    assert n < 16 or power / powered > 0.9
