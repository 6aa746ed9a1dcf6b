"""Verdicts on tables of heads: none in noise, power on planted heads, and the floor at which nothing is ranked."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from interp.analyses.results import table_statistics
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.leading import leading_heads
from interp.hooks.model.heads import Head

NAN = math.nan
LAYERS, HEADS, CUT = 30, 9, 0.3
SIZES = (4, 8, 16, 50)
N_TABLES, N_SIGNED_TABLES = 120, 800
"""tables of scores of at least 0, and of signed ones, for which the test is quick and its level is exactly 5 %"""
MAX_SHARE = 0.06
"""share of false positives that is allowed at the 5 % level"""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _beta(mean: float, spread: float, n: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.beta(mean * spread, (1 - mean) * spread, (n, LAYERS * HEADS)))


def _shared(n: int, seed: int) -> torch.Tensor:
    """Half of each score is the prompt's, so that all heads depend on each other."""
    easy = torch.rand(n, 1, generator=_generator(seed)) < CUT
    own = torch.rand(n, LAYERS * HEADS, generator=_generator(seed + 1)) < CUT
    return (easy.double() + own.double()) / 2


NOISE = {
    "0 or 1": lambda n, seed: (torch.rand(n, LAYERS * HEADS, generator=_generator(seed)) < CUT).double(),
    "0 or a little above the threshold": lambda n, seed: (
        0.4 * (torch.rand(n, LAYERS * HEADS, generator=_generator(seed)) < 0.75).double()
    ),
    "even": lambda n, seed: 2 * CUT * torch.rand(n, LAYERS * HEADS, generator=_generator(seed)).double(),
    "skewed": lambda n, seed: _beta(CUT, 0.5, n, seed),
    "narrow": lambda n, seed: _beta(CUT, 50.0, n, seed),
    "without an upper end": lambda n, seed: (
        CUT * torch.from_numpy(np.random.default_rng(seed).exponential(size=(n, LAYERS * HEADS)))
    ),
    "dependent": _shared,
}
"""tables in which the true score of every head is the threshold, the highest that is not above it"""


def _adjusted(values: torch.Tensor) -> torch.Tensor:
    return table_statistics.benjamini_hochberg(table_statistics.p_values_above(values, CUT))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", NOISE)
def test_noise_has_no_confident_heads(kind, n):
    found = sum(bool((_adjusted(NOISE[kind](n, 1000 * seed)) <= 0.05).any()) for seed in range(N_TABLES))
    assert found <= MAX_SHARE * N_TABLES, f"{found} of {N_TABLES} tables of noise have confident heads"


@pytest.mark.parametrize("n", SIZES)
def test_planted_heads_are_found_and_false_ones_are_few(n):
    found, false = [], []
    for seed in range(N_TABLES):
        values = _beta(CUT, 4.0, n, seed)
        values[:, :10] = _beta(0.8, 20.0, n, 10_000 + seed)[:, :10]
        confident = _adjusted(values) <= 0.05
        found.append(float(confident[:10].double().mean()))
        false.append(float(confident[10:].sum()) / max(1, int(confident.sum())))
    power, rate = sum(found) / N_TABLES, sum(false) / N_TABLES
    print(f"n = {n}: {power:.0%} of 10 planted heads confident, {rate:.1%} of the confident heads false")
    assert rate <= MAX_SHARE
    assert power >= {4: 0.0, 8: 0.5, 16: 0.95, 50: 1.0}[n]


@pytest.mark.parametrize("n", SIZES)
def test_signed_noise_has_no_confident_heads(n):
    found, rng = 0, np.random.default_rng(n)
    for _ in range(N_SIGNED_TABLES):
        values = torch.from_numpy(rng.standard_normal((n, LAYERS * HEADS))) + CUT
        found += bool((_adjusted(values) <= 0.05).any())
    # the level is exactly 5 %, so the count may exceed it by chance
    assert stats.binomtest(found, N_SIGNED_TABLES, 0.05, "greater").pvalue > 0.001, found


@pytest.mark.parametrize("n", [1, 4, 8, 16, 50, 100])
def test_counts_have_the_exact_binomial_p(n):
    for right in {0, 1, n // 4, n // 2, n - 1, n}:
        values = torch.zeros(n, 1)
        values[:right] = 1.0
        exact = stats.binom.sf(right - 1, n, CUT) if right / n > CUT else 1.0
        assert float(table_statistics.p_values_above(values, CUT)[0]) == pytest.approx(exact, rel=1e-2)


def test_equal_scores_are_so_many_successes_and_no_certainty():
    values = torch.ones(5, 3)
    values[3:, 1] = NAN
    values[:, 2] = NAN
    p = table_statistics.p_values_above(values, CUT)
    assert p[:2].tolist() == pytest.approx([CUT**5, CUT**3])
    assert p[2].isnan()
    # no bound is known for scores below 0, so equal scores show nothing
    signed = torch.cat([torch.ones(5, 1), torch.randn(5, 1)], 1)
    assert float(table_statistics.p_values_above(signed, CUT)[0]) == 1.0


def test_p_is_the_share_of_weightings_below_the_cut():
    values = torch.rand(9, 4, generator=_generator(3)).double() ** 2 + torch.tensor([0.0, 0.1, 0.2, 0.0])
    drawn = np.random.default_rng(0).dirichlet(np.ones(10), 400_000) @ np.vstack([values.numpy(), np.zeros(4)])
    wanted = np.where(values.numpy().mean(0) > CUT, (drawn <= CUT).mean(0), 1.0)
    assert table_statistics.p_values_above(values, CUT).numpy() == pytest.approx(wanted, abs=3e-3)


def test_adjusted_p_values_are_scipys():
    p = torch.rand(40, generator=_generator(0)).double() ** 3
    assert table_statistics.benjamini_hochberg(p).numpy() == pytest.approx(stats.false_discovery_control(p.numpy()))
    holes = torch.cat([p, torch.tensor([NAN])])
    assert table_statistics.benjamini_hochberg(holes)[:-1].numpy() == pytest.approx(
        stats.false_discovery_control(p.numpy())
    )
    assert table_statistics.benjamini_hochberg(holes)[-1].isnan()


@pytest.mark.parametrize(
    ("values", "floor", "ranked"),
    [
        ([0.0, 0.5, 0.2], 0.0, 2),
        ([0.0, 0.0, 0.2], 0.0, 1),
        ([0.1, 0.5, 0.2], -math.inf, 3),
        ([0.1, 0.1, 0.2], 0.1, 1),
        ([0.3, 0.3, 0.3], 0.3, 0),
        ([0.0, 0.0, 0.0], 0.0, 0),
        ([NAN, NAN, NAN], -math.inf, 0),
        # one head without an effect lies between others, many are a floor
        ([-0.2, 0.0, 0.2], -math.inf, 3),
        ([-0.2, 0.0, 0.0, 0.2], 0.0, 1),
        ([NAN, 0.0, 0.0, 0.2], 0.0, 1),
    ],
)
def test_heads_at_the_floor_have_no_rank(values, floor, ranked):
    scores = HeadScores("x", torch.tensor(values)[None, None])
    assert scores.floor == pytest.approx(floor)
    assert len(scores.top(10)) == ranked
    assert scores.heads(top=10) == scores.heads(top=ranked)
    assert scores.top(10) == sorted(scores.top(10), key=lambda head: -scores[head])
    assert len(scores.leading(10)) == ranked
    assert len(leading_heads({"x": scores}, per_table=10)) == ranked


def test_a_few_equal_low_scores_are_no_floor():
    values = torch.arange(30.0)
    values[1] = values[0] = 0.5
    assert HeadScores("x", values.view(1, 5, 6)).floor == -math.inf
    values[:3] = 0.5
    assert HeadScores("x", values.view(1, 5, 6)).floor == 0.5


def test_ties_are_broken_by_the_seed_and_differently_in_each_table():
    values = torch.ones(1, LAYERS, HEADS)
    values[:, :15] = 2.0
    one, again, other = (HeadScores("x", values, seed=seed) for seed in (0, 0, 1))
    assert one.top(20) == again.top(20) != other.top(20)
    # tied heads of two tables are shared as often as by chance
    tables = [HeadScores("x", values + 0.001 * step) for step in range(40)]
    shared = [one.compare(each, 10).overlap for each in tables]
    assert sum(shared) / 40 == pytest.approx(100 / 135, abs=0.4)


def _planted(n: int, seed: int) -> HeadScores:
    values = torch.rand(n, LAYERS, HEADS, generator=_generator(seed)) * 0.2
    values[:, 20, :3] += torch.tensor([0.7, 0.6, 0.5])
    return HeadScores("planted", values)


def test_leading_heads_of_noise_are_held_out_at_their_true_score():
    naive, held_out = [], []
    for seed in range(40):
        scores = HeadScores("noise", torch.rand(8, LAYERS, HEADS, generator=_generator(seed)))
        found = scores.leading(5)
        naive += [each.value for each in found]
        held_out.append([each.held_out for each in found])
    # the best of 270 are far above their true score of 0.5, the estimates are not
    assert sum(naive) / len(naive) > 0.72
    assert torch.tensor(held_out).mean(0).tolist() == pytest.approx([0.5] * 5, abs=0.03)


def test_planted_heads_keep_their_score_and_their_rank():
    scores = _planted(16, 0)
    found = scores.leading(3)
    assert [each.head for each in found] == [Head(20, 0), Head(20, 1), Head(20, 2)]
    for each in found:
        assert each.held_out == pytest.approx(each.value, abs=1e-3)
        assert each.top_share == 1.0
    last = scores.leading(10)[-1]
    assert last.top_share < 0.9
    assert last.held_out < last.value


def test_the_split_half_correlation_is_that_of_the_halves():
    assert abs(HeadScores("noise", torch.rand(16, LAYERS, HEADS)).split_half) < 0.1
    base = torch.rand(1, LAYERS, HEADS)
    assert HeadScores("same", base + 0.01 * torch.rand(16, LAYERS, HEADS)).split_half > 0.99
    values = torch.rand(2, 3, 4)
    expected = stats.spearmanr(values[0].flatten(), values[1].flatten())[0]
    assert HeadScores("two", values).split_half == pytest.approx(expected)
    for nothing in (torch.rand(1, 3, 4), torch.ones(8, 3, 4), torch.full((8, 3, 4), NAN)):
        assert math.isnan(HeadScores("nothing", nothing).split_half)


def test_one_prompt_has_neither_stability_nor_a_held_out_score():
    (found,) = HeadScores("one", torch.tensor([[[0.2, 0.5]]])).leading(1)
    assert math.isnan(found.held_out)
    assert math.isnan(found.top_share)


def test_overlaps_within_layers_are_permutations_within_layers():
    sizes, one, other = [4, 5, 6], [2, 0, 3], [1, 2, 4]
    generator, counts = np.random.default_rng(0), []
    for _ in range(20_000):
        shared = 0
        for size, mine, theirs in zip(sizes, one, other, strict=True):
            shared += int((generator.permutation(size)[:mine] < theirs).sum())
        counts.append(shared)
    assert table_statistics.expected_overlap(one, other, sizes) == pytest.approx(np.mean(counts), abs=0.02)
    for overlap in range(5):
        wanted = np.mean(np.array(counts) >= overlap)
        assert table_statistics.overlap_p_value(one, other, sizes, overlap) == pytest.approx(wanted, abs=0.01)
    assert table_statistics.overlap_p_value([8], [8], [32], 5) == pytest.approx(stats.hypergeom(32, 8, 8).sf(4))


def _in_layer(layer: int, heads: range, seed: int) -> HeadScores:
    """Zero but for some heads of a layer."""
    values = torch.zeros(1, LAYERS, HEADS)
    values[0, layer, list(heads)] = torch.rand(len(heads), generator=_generator(seed)) + 0.5
    return HeadScores(f"layer {layer}", values)


def test_tables_without_a_common_head_share_none():
    for k in (3, 10, 100):
        found = _in_layer(3, range(4), 0).compare(_in_layer(20, range(4), 1), k)
        assert found.overlap == 0
        assert found.lengths == (min(k, 4), min(k, 4))
        assert found.p_overlap == 1.0
        assert found.shared == ()
    flat = HeadScores("flat", torch.zeros(1, LAYERS, HEADS))
    nothing = flat.compare(_in_layer(3, range(4), 0), 10)
    assert (nothing.overlap, nothing.expected_overlap) == (0, 0.0)
    assert math.isnan(nothing.p_overlap)
    assert "no p, since a list is empty" in str(nothing)


def test_heads_of_one_layer_are_shared_by_the_layer_alone():
    # six of nine heads of a layer each: three are shared at least, and four are expected
    one, other = _in_layer(7, range(6), 0), _in_layer(7, range(2, 8), 1)
    found = one.compare(other, 6)
    assert found.overlap == 4
    assert found.expected_overlap == pytest.approx(36 / 270)
    assert found.expected_within_layers == pytest.approx(4.0)
    assert found.depth_overlap == pytest.approx(4.0)
    assert found.p_overlap > 0.5
    assert one.compare(one, 6).p_overlap == pytest.approx(stats.hypergeom(9, 6, 6).sf(5))


@pytest.mark.parametrize("seed", range(3))
def test_the_p_of_an_overlap_is_uniform_when_layers_alone_agree(seed):
    generator, found = _generator(seed), []
    strength = torch.linspace(0, 3, LAYERS)[:, None]
    for _ in range(150):
        one, other = (HeadScores("x", (strength + torch.rand(LAYERS, HEADS, generator=generator))[None]) for _ in "ab")
        found.append(one.compare(other, 10).p_overlap)
    assert sum(p <= 0.05 for p in found) <= MAX_SHARE * len(found)


def test_a_depth_profile_ranks_by_layers():
    scores = _planted(6, 1)
    profile = scores.depth_profile()
    assert profile.name == "planted_depth"
    assert torch.allclose(profile.values, scores.values.mean(1, keepdim=True).expand(-1, HEADS))
    assert {head.layer for head in profile.top(HEADS)} == {20}
    agreed = scores.compare(profile, HEADS)
    assert agreed.depth_overlap == pytest.approx(sum(head.layer == 20 for head in scores.top(HEADS)))


def test_a_threshold_curve_counts_heads():
    scores = HeadScores("x", _planted(16, 2).per_prompt, threshold=0.3)
    points = scores.threshold_curve()
    assert len(points) == 20
    assert 0.3 in [point.threshold for point in points]
    for point in points:
        assert point.above == len(scores.heads(above=point.threshold))
        assert point.confident == len(scores.confident(point.threshold)) <= point.above
    assert [point.confident for point in scores.threshold_curve([0.3, 0.99])] == [3, 0]
    assert HeadScores("x", torch.zeros(3, 2, 2)).threshold_curve() == ()


@pytest.mark.parametrize(("k", "first"), [(1, 1), (2, 2), (5, 2), (20, 2)])
def test_heads_at_the_floor_are_never_resampled_to_the_top(k, first):
    """Two of twelve heads score above 0, so a longer list has two heads in every resample."""
    values = torch.zeros(25, 12)
    values[:, 3], values[:, 7] = 2.0, 1.0 + torch.arange(25) / 100
    shares = table_statistics.top_shares(values, k)
    expected = torch.zeros(12)
    expected[[3, 7][:first]] = 1.0
    assert torch.equal(shares, expected)
    lone = torch.zeros(25, 12)
    lone[0, 5] = 1.0
    # in a resample without the first prompt no head is above the floor
    share = table_statistics.top_shares(lone, k)
    assert float(share[5]) == pytest.approx(1 - (24 / 25) ** 25, abs=0.05)
    assert int((share > 0).sum()) == 1
