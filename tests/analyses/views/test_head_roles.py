"""Heads sorted into roles by their scores and intervals."""

import pytest
import torch

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.head_roles import HeadRoles, head_roles, threshold_of
from interp.errors import ScoreError
from interp.hooks.model.heads import Head, HeadSet


def table(name: str, rows: dict[tuple[int, int], list[float]], threshold: float | None = None) -> HeadScores:
    """Three layers of two heads, 0 but for the given values, one a prompt."""
    n = len(next(iter(rows.values())))
    values = torch.zeros(n, 3, 2)
    for (layer, head), column in rows.items():
        values[:, layer, head] = torch.tensor(column)
    return HeadScores(name, values, threshold=threshold)


RETRIEVAL = table("retrieval", {(1, 0): [0.9, 0.8, 1.0, 0.9] * 3, (2, 1): [0.0, 0.0, 0.0, 1.0] * 3}, 0.1)
INDUCTION = table("induction", {(1, 0): [0.8] * 12, (0, 1): [0.5] * 12, (2, 1): [0.6] * 12})
SINKS = table("sinks", {(1, 0): [0.9] * 12, (2, 0): [0.9] * 12}, 0.3)


def test_a_head_has_every_role_above_its_cut_and_is_confident_by_a_test():
    found = head_roles({"sinks": SINKS, "retrieval": RETRIEVAL, "induction": INDUCTION})
    assert found.names == ("retrieval", "induction", "sinks")
    assert found.thresholds == (0.1, 0.3, 0.3)
    assert found.heads("retrieval") == HeadSet((Head(1, 0), Head(2, 1)))
    # a quarter of the prompts: the mean is above the threshold, but the test cannot tell it from a lower one
    assert found.confident[0, 1, 0]
    assert not found.confident[0, 2, 1]
    assert found.of(Head(1, 0)) == ["retrieval", "induction", "sinks"]
    assert found.of(Head(0, 0)) == []


def test_a_head_is_sorted_under_its_first_confident_role():
    found = head_roles({"sinks": SINKS, "retrieval": RETRIEVAL, "induction": INDUCTION})
    # L2H1 is a tentative retrieval head and a confident induction head
    assert found.main.tolist() == [[-1, 1], [0, -1], [2, 1]]
    alone = head_roles({"retrieval": RETRIEVAL})
    assert alone.main.tolist() == [[-1, -1], [0, -1], [-1, 0]]


def test_equal_scores_on_few_prompts_are_no_certainty():
    values = torch.zeros(4, 30, 9)
    values[:, 3, 4] = 1.0
    few = HeadScores("induction", values)
    found = head_roles({"induction": few})
    assert found.heads("induction") == HeadSet((Head(3, 4),))
    assert not found.confident.any()
    # four successes at a threshold of 0.3, the best of 270 tests
    assert float(found.adjusted_p[0, 3, 4]) == pytest.approx(min(1.0, 270 * 0.3**4))
    assert head_roles({"induction": HeadScores("induction", values.repeat(3, 1, 1))}).confident.sum() == 1


def test_tables_without_a_cut_are_left_out_unless_one_is_given():
    other = table("gradient_importance", {(0, 0): [0.5] * 4})
    assert head_roles({"gradient_importance": other, "sinks": SINKS}).names == ("sinks",)
    assert head_roles({"gradient_importance": other}, thresholds={"gradient_importance": 0.2}).heads(
        "gradient_importance"
    ) == HeadSet((Head(0, 0),))
    assert threshold_of("gradient_importance", other) is None
    assert threshold_of("induction", INDUCTION) == 0.3
    assert threshold_of("tracker", table("tracker", {(0, 0): [0.5] * 4}, 0.0)) is None
    with pytest.raises(ScoreError, match="no table has a threshold; give thresholds"):
        head_roles({"gradient_importance": other})
    with pytest.raises(ScoreError, match="no scores"):
        head_roles({})


def test_heads_without_a_score_have_no_role():
    values = INDUCTION.per_prompt.clone()
    values[:, 1, 0] = torch.nan
    found = head_roles({"induction": HeadScores("induction", values)})
    assert not found.has[0, 1, 0]
    assert found.main[1, 0] == -1


def test_tables_of_different_models_are_refused():
    wide = HeadScores("sinks", torch.zeros(2, 4, 2), threshold=0.3)
    with pytest.raises(ScoreError, match="give the scores of one model"):
        head_roles({"sinks": wide, "retrieval": RETRIEVAL})


def test_roles_are_stored_and_listed(tmp_path):
    found = head_roles({"sinks": SINKS, "retrieval": RETRIEVAL, "induction": INDUCTION})
    again = HeadRoles.load(found.save(tmp_path / "roles"))
    assert (again.names, again.thresholds) == (found.names, found.thresholds)
    assert torch.equal(again.has, found.has)
    assert list(found.to_frame()["role"]) == ["", "induction", "retrieval", "", "sinks", "induction"]
    assert "1 confident, 1 tentative  L1H0, L2H1" in found.summary()
