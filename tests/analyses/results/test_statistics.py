"""Statistics: means and intervals against numpy and scipy, exact sums, and overlaps of random rankings."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from interp.analyses.results import statistics
from interp.analyses.results.statistics import Estimate

RNG = np.random.default_rng(0)
VALUES = RNG.normal(1.0, 2.0, 40)


def test_an_estimate_excludes_zero_where_its_interval_lies_on_one_side():
    assert Estimate(1.0, 0.1, 2.0).excludes_zero
    assert Estimate(-1.0, -2.0, -0.1).excludes_zero
    assert not Estimate(1.0, 0.0, 2.0).excludes_zero
    assert not Estimate(math.nan, math.nan, math.nan).excludes_zero


def test_one_row_has_the_percentile_bootstrap_of_scipy():
    wanted = stats.bootstrap((VALUES,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    spread = VALUES.std() / len(VALUES) ** 0.5
    for found in (
        statistics.mean_over_draws([VALUES.tolist()], n_resamples=5000),
        statistics.mean_over_prompts(torch.tensor(VALUES), n_resamples=5000),
        statistics.pooled_mean([VALUES.tolist()], n_resamples=5000),
    ):
        assert found.mean == pytest.approx(VALUES.mean(), abs=1e-12)
        assert found.low == pytest.approx(wanted.low, abs=0.1 * spread)
        assert found.high == pytest.approx(wanted.high, abs=0.1 * spread)


def test_intervals_are_quantiles_of_resampled_means():
    rows = RNG.normal(size=(3, 8))
    random = torch.Generator().manual_seed(7)
    means = []
    for _ in range(200):
        draws = torch.randint(3, (3,), generator=random).numpy()
        prompts = torch.randint(8, (8,), generator=random).numpy()
        means.append(rows[draws][:, prompts].mean())
    found = statistics.bootstrap(rows.tolist(), level=0.9, n_resamples=200, seed=7)
    assert found == pytest.approx(np.quantile(means, [0.05, 0.95]), abs=1e-12)
    assert statistics.mean_over_draws(rows.tolist(), 0.9, 200, 7) == (pytest.approx(rows.mean()), *found)


def test_draws_widen_an_interval():
    draws = RNG.normal(size=(3, 1)) * 5
    rows = draws + RNG.normal(size=(3, 50))
    low, high = statistics.bootstrap(rows.tolist())
    narrow = statistics.mean_over_prompts(torch.tensor(rows.mean(0)))
    assert high - low > 3 * (narrow.high - narrow.low)
    assert low < rows.mean() < high


def test_differences_are_of_each_prompt_with_itself():
    prompts = RNG.normal(0, 100, 30)
    one = np.stack([prompts + 1, prompts + 3])
    other = prompts[None]
    found = statistics.paired_difference(one.tolist(), other.tolist())
    # every prompt rises by 2, so the interval has no width although the prompts differ by 100
    assert found == pytest.approx((2.0, 2.0, 2.0), abs=1e-9)
    noise = RNG.normal(size=30)
    found = statistics.paired_difference([(prompts + noise).tolist()], other.tolist(), n_resamples=5000)
    assert found.mean == pytest.approx(noise.mean())
    wanted = stats.bootstrap((noise,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert found[1:] == pytest.approx((wanted.low, wanted.high), abs=0.04)
    first, second = one[:1].tolist(), other.tolist()
    forth, back = (statistics.paired_difference(*sides) for sides in ((first, second), (second, first)))
    assert back == pytest.approx((-forth.mean, -forth.high, -forth.low), abs=1e-12)


def test_every_task_has_the_same_weight():
    rows = [[0.0] * 100, [1.0, 1.0]]
    assert statistics.pooled_mean(rows) == (0.5, 0.5, 0.5)
    tasks = [RNG.normal(0, 1, 50), RNG.normal(3, 4, 10)]
    found = statistics.pooled_mean([row.tolist() for row in tasks], n_resamples=5000)
    assert found.mean == pytest.approx((tasks[0].mean() + tasks[1].mean()) / 2)
    error = math.sqrt(sum(row.var() / len(row) for row in tasks)) / 2
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_columns_are_resampled_together_and_nan_does_not_count():
    values = torch.tensor(RNG.normal(size=(12, 4)))
    values[3:, 1] = torch.nan
    values[1:, 2] = torch.nan
    values[:, 3] = torch.nan
    found = statistics.column_intervals(values, n_resamples=2000)
    assert found.shape == (2, 4)
    assert found.dtype == torch.float32
    wanted = stats.bootstrap(
        (values[:, 0].numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert found[:, 0].tolist() == pytest.approx([wanted.low, wanted.high], abs=0.06)
    least, largest = values[:3, 1].min().float(), values[:3, 1].max().float()
    assert least <= found[0, 1] <= found[1, 1] <= largest
    # one prompt, or none, has no interval
    assert found[:, 2:].isnan().all()
    # columns that are computed a few at a time are the same
    assert torch.equal(statistics.column_intervals(values, n_resamples=2000, max_elements=2000)[:, :2], found[:, :2])
    assert statistics.column_intervals(values[:1]).isnan().all()


def test_weighted_means_do_not_depend_on_the_order():
    values = torch.tensor(RNG.normal(size=(50, 6)) * 10.0 ** RNG.integers(-6, 6, (50, 6)))
    values[::7, 2] = torch.nan
    weights = torch.tensor(RNG.integers(0, 4, (9, 50))).double()
    found = statistics.weighted_means(weights, values)
    for seed in range(5):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(statistics.weighted_means(weights[:, order], values[order]), found)
    masked = np.ma.masked_invalid(values.numpy())
    wanted = [np.ma.filled(np.ma.average(masked, axis=0, weights=row), np.nan) for row in weights.numpy()]
    torch.testing.assert_close(found, torch.tensor(np.array(wanted)), rtol=1e-9, atol=1e-9)


def test_correlation_is_numpys():
    one, other = torch.randn(20), torch.randn(20)
    assert statistics.correlation(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-6)
    assert statistics.correlation(one, -2 * one) == pytest.approx(-1.0)
    assert math.isnan(statistics.correlation(one, torch.ones(20)))
    assert math.isnan(statistics.correlation(one[:1], other[:1]))


def test_seeds_repeat_and_differ():
    rows = [VALUES.tolist()]
    for function in (statistics.mean_over_draws, statistics.pooled_mean):
        assert function(rows, seed=3) == function(rows, seed=3)
        assert function(rows, seed=3)[1:] != function(rows, seed=4)[1:]
