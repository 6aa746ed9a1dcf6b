"""The test of a head set against random head sets, in null experiments and with an effect."""

import numpy as np
import pytest

from interp.analyses.results.set_test import CLAIMS, is_settled, set_test
from interp.errors import UsageError


@pytest.mark.parametrize("n_sets", [1, 3, 38])
def test_few_sets_allow_no_verdict(n_sets):
    test = set_test(100.0, [0.0] * n_sets, 0.0)
    assert not test.decided
    assert not test.is_beyond


@pytest.mark.parametrize(
    ("tested", "claim", "beyond"),
    [(-5.0, "larger effect", 3), (1.1, "larger effect", 0), (1.1, "smaller effect", 3), (-5.0, "higher", 0)],
)
def test_claims_order_sets_by_effect_or_value(tested, claim, beyond):
    assert set_test(tested, [2.0, 0.0, 3.0], 1.0, claim).n_beyond == beyond


def test_ties_count_against_the_tested_set():
    assert set_test(0.0, [0.0] * 99, 1.0).p_value == pytest.approx(1.0)
    assert set_test(0.0, [0.0] + [1.0] * 98, 1.0).n_beyond == 98


@pytest.mark.parametrize("random", [[2.0, 0.0], [2.0, 0.0, 3.0], [0.2, 0.4, 0.1, 0.9, 0.5]])
def test_deviations_are_in_standard_deviations_of_the_random_sets(random):
    test = set_test(-5.0, random, 1.0)
    assert test.difference == pytest.approx(-5.0 - np.mean(random))
    assert test.deviations == pytest.approx(test.difference / np.std(random, ddof=1))
    assert np.isnan(set_test(-5.0, random[:1] * 3, 1.0).deviations)


def test_unusable_values_are_refused():
    with pytest.raises(UsageError, match="no random head sets"):
        set_test(1.0, [], 0.0)
    with pytest.raises(UsageError, match="unknown claim 'lower'"):
        set_test(1.0, [1.0], 0.0, "lower")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("n_prompts", [4, 8, 16, 50])
@pytest.mark.parametrize("measure", ["loss", "accuracy"])
def test_random_heads_are_beyond_random_heads_in_at_most_six_percent(measure, n_prompts, claim):
    """Sets differ and prompts differ; the tested set is one more random set. The draws end as in an ablation test."""
    random = np.random.default_rng(n_prompts)
    trials, found, n_drawn = 2000 if measure == "loss" else 400, {"null": 0, "real": 0}, 0
    shift = {"larger effect": 3.0, "smaller effect": 0.0, "higher": 3.0}[claim]
    for _ in range(trials):
        difficulty = random.normal(size=n_prompts)
        effects = np.abs(random.normal(1.0, 0.5, size=100))
        for kind in found:
            own = effects[0] if kind == "null" else shift
            values = _values(measure, np.array([0.0, own, *effects[1:]]), difficulty, random)
            baseline, tested, sets = float(values[0]), float(values[1]), values[2:]
            order = {"larger effect": abs(values - baseline), "smaller effect": -abs(values - baseline)}
            extreme = order.get(claim, values)
            reached = (extreme[2:] >= extreme[1]).cumsum()
            end = 39 if not reached[38] else int((reached < 5).sum()) + 1
            drawn = sets[:end].tolist()
            if kind == "null" and _ < 20 and end <= 99:
                assert is_settled(tested, drawn, baseline, claim, 99)
                assert not is_settled(tested, drawn[:-1], baseline, claim, 99)
            n_drawn += len(drawn)
            test = set_test(tested, drawn, baseline, claim, 99)
            found[kind] += test.is_beyond
    print(f"{measure}, {claim}, {n_prompts} prompts: false positives {found['null'] / trials:.1%}, "
          f"power {found['real'] / trials:.0%}, {n_drawn / trials / 2:.0f} of 99 sets drawn")  # fmt: skip
    assert found["null"] / trials <= 0.06
    # a share has a floor and cannot rise, so its claims have less power
    assert measure == "accuracy" or found["real"] / trials > 0.9


@pytest.mark.parametrize("n_planned", [39, 59, 99, 199])
def test_p_values_of_every_end_are_exact(n_planned):
    """All ranks of the tested set are equally likely; p-values are at most alpha in at most alpha of all draws."""
    random, found, most = np.random.default_rng(n_planned), [], int(0.05 * (1 + n_planned))
    for number in range(4000):
        values = random.permutation(n_planned + 1).astype(float)
        tested, sets = values[0], values[1:]
        reached = (sets > tested).cumsum()
        end = 39 if not reached[38] else int((reached < most).sum()) + 1
        drawn = sets[:end].tolist()
        if number < 20 and end <= n_planned:
            assert is_settled(tested, drawn, -1.0, "larger effect", n_planned) == (
                n_planned > 39 or reached[-1] >= most
            )
            assert not is_settled(tested, drawn[:-1], -1.0, "larger effect", n_planned)
        found.append(set_test(tested, drawn, -1.0, n_planned=n_planned).p_value)
    for alpha in (0.025, 0.03, 0.04, 0.05, 0.1):
        share = np.mean(np.array(found) <= alpha + 1e-12)
        assert share <= alpha + 3 * (alpha / 4000) ** 0.5, (alpha, share)


def test_draws_end_after_39_sets_where_none_is_as_extreme():
    sets = [1.0] * 39
    assert is_settled(5.0, sets, 0.0, "larger effect", 99)
    assert not is_settled(5.0, sets[:-1], 0.0, "larger effect", 99)
    assert not is_settled(5.0, sets, 0.0, "larger effect", 99, first_look=False)
    assert not is_settled(5.0, sets, 0.0, "larger effect", 39)
    test = set_test(5.0, sets, 0.0, n_planned=99)
    assert (test.p_value, test.ended_early, test.decided, test.is_beyond) == (1 / 40, True, True, True)


def test_all_sets_without_an_early_end_have_the_plain_p_value():
    assert set_test(5.0, [1.0] * 99, 0.0).p_value == 0.01
    assert set_test(5.0, [1.0] * 60 + [9.0] + [1.0] * 38, 0.0).p_value == 0.02
    # the draws could have ended after 39 sets
    late = set_test(5.0, [9.0] + [1.0] * 98, 0.0).p_value
    assert late == pytest.approx(0.025 + 0.02 - 0.01 * (1 + 60 / 99))


def _values(measure: str, effects: np.ndarray, difficulty: np.ndarray, random: np.random.Generator) -> np.ndarray:
    if measure == "loss":
        return 2 + effects + 0.1 * difficulty.mean()
    noise = random.normal(0, 0.3, (len(effects), len(difficulty)))
    return (difficulty + 1.5 - effects[:, None] + noise > 0).mean(1)
