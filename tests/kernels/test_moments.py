"""Moments of keys, and the log-normal estimate on Gaussian keys."""

import math

import attention_calls
import pytest
import torch

from interp.kernels.moments import Moments, far_bulk, log_bulk

D, KEYS = 64, 4096


def gaussian(v, queries=64, seed=0):
    """Return the error of the estimate for random queries on Gaussian keys, whose logits have the variance v [q]."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=rng, dtype=torch.float64) / D**0.5
    k = torch.randn(KEYS, D, generator=rng, dtype=torch.float64) @ mix + torch.randn(D, generator=rng).double()
    mean, covariance = k.mean(0), torch.cov(k.T, correction=0)
    q = torch.randn(queries, D, generator=rng, dtype=torch.float64)
    q = q * (v / ((q @ covariance) * q).sum(-1)).sqrt()[:, None]
    estimate, found = log_bulk(q, mean, covariance, torch.tensor(float(KEYS)), 1.0)
    torch.testing.assert_close(found, torch.full_like(found, v), atol=1e-9, rtol=1e-9)
    return estimate - torch.logsumexp(q @ k.T, -1), q, k, mean, covariance


@pytest.mark.parametrize(
    ("v", "low", "high", "spread"), [(0.74, -0.03, 0.03, 0.1), (4.8, -0.2, 0.3, 0.6), (10.4, -0.8, 1.5, 2.0)]
)
def test_estimate_is_accurate_for_small_v(v, low, high, spread):
    error = gaussian(v)[0]
    assert low < error.mean() < high
    assert error.abs().max() < spread + 1


def test_estimate_fails_beyond_the_log_of_the_number_of_keys():
    # the estimate without its second formula, which removes part of the error
    plain = math.log(KEYS) + 38 / 2 - (2 * 38 * math.log(KEYS)) ** 0.5
    error = gaussian(38.0)[0].mean()
    assert 3 < error + plain < 5
    assert 0 < error < 2.5
    errors = [gaussian(v)[0].abs().mean() for v in (1.0, 4.0, 8.3, 20.0, 38.0)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("v", [0.5, 2.0, 4.0])
def test_labels_agree_with_the_truth(v):
    """Labels of local and long rows, for near keys with any share of the attention."""
    error, q, k, _, _ = gaussian(v, queries=2000)
    exact = torch.logsumexp(q @ k.T, -1)
    near = exact + 3 * torch.randn(len(q), dtype=torch.float64)
    agree = (near - exact >= 0) == (near - (exact + error) >= 0)
    assert agree.double().mean() > 0.9


def test_moving_moments_equal_those_of_the_range():
    call = attention_calls.causal_call(b=2, h=4, g=2, n=50)
    moments = Moments.of(call, torch.tensor([2, 10]))
    for high, low in [(5, None), (20, 1), (20, 8), (41, 30), (30, 12), (50, 45)]:
        moments.move(high, low)
        for row, begin in enumerate((2, 10)):
            part = call.k[row, :, max(begin, moments.low) : max(moments.high, begin)]
            assert moments.count[row] == part.shape[1]
            if part.shape[1] > 1:
                mean, covariance = (x[row] for x in moments.values(torch.float64))
                torch.testing.assert_close(mean, part.mean(1))
                torch.testing.assert_close(covariance, torch.stack([torch.cov(x.T, correction=0) for x in part]))
    assert (moments.low, moments.high) == (45, 50)


@pytest.mark.parametrize("sliding", [None, 20])
@pytest.mark.parametrize("refresh", [1, 6])
def test_estimates_are_of_all_keys_beyond_the_window(refresh, sliding):
    """The moments end with the last key beyond the window of the first query of each block, which is counted once."""
    n, sink, window = 50, 2, 5
    call = attention_calls.causal_call(b=2, h=4, g=2, n=n, window=sliding)
    first = torch.tensor([0, 9])
    estimate, v, count, counts = far_bulk(call, first, sink, window, refresh, 3)
    starts = [0, *range(n % refresh or refresh, n, refresh)]
    for row in range(n):
        start = max(each for each in starts if each <= row)
        for b in range(2):
            low, low_of_row = (
                max(sink + int(first[b]), 0 if sliding is None else q - sliding + 1) for q in (start, row)
            )
            keys = call.k[b, :, low : max(start - window + 1, low)].double()
            assert bool(counts[b, 0, row]) is (keys.shape[1] >= 3 and row - window + 1 > low_of_row)
            if not counts[b, 0, row]:
                continue
            assert count[b, 0, row] == row - window + 1 - low_of_row
            covariance = torch.stack([torch.cov(x.T, correction=0) for x in keys])
            number = count[b, 0, row].double().expand(2)
            for g in range(2):
                q = call.q[b, 2 * g : 2 * g + 2, row].double()
                expected = log_bulk(q, keys[g].mean(0), covariance[g], number, call.scale)
                for found, each in zip((estimate, v), expected, strict=True):
                    torch.testing.assert_close(found[b, 2 * g : 2 * g + 2, row].double(), each, atol=1e-5, rtol=1e-5)
