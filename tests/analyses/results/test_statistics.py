"""Statistics of tables: exact sums, correlations and overlaps of random rankings against numpy and scipy."""

import math

import numpy as np
import pytest
import torch

from interp.analyses.results import statistics

RNG = np.random.default_rng(0)


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
