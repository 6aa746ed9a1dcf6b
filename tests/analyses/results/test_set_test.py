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
    assert set_test(0.0, [0.0] * 99, 1.0).p_value == 1.0
    assert set_test(0.0, [0.0] + [1.0] * 98, 1.0).n_beyond == 98


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
            end = int((reached < 5).sum()) + 1
            drawn = sets[:end].tolist()
            if kind == "null" and _ < 20 and end <= 99:
                assert is_settled(tested, drawn, baseline, claim, 99)
                assert not is_settled(tested, drawn[:-1], baseline, claim, 99)
            n_drawn += len(drawn)
            found[kind] += set_test(tested, drawn, baseline, claim, 99).is_beyond
    print(f"{measure}, {claim}, {n_prompts} prompts: false positives {found['null'] / trials:.1%}, "
          f"power {found['real'] / trials:.0%}, {n_drawn / trials / 2:.0f} of 99 sets drawn")  # fmt: skip
    assert found["null"] / trials <= 0.06
    # a share has a floor and cannot rise, so its claims have less power
    assert measure == "accuracy" or found["real"] / trials > 0.9


def _values(measure: str, effects: np.ndarray, difficulty: np.ndarray, random: np.random.Generator) -> np.ndarray:
    if measure == "loss":
        return 2 + effects + 0.1 * difficulty.mean()
    noise = random.normal(0, 0.3, (len(effects), len(difficulty)))
    return (difficulty + 1.5 - effects[:, None] + noise > 0).mean(1)
