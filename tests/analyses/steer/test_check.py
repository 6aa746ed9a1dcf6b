"""The test of an edit: its conditions, its numbers, and the result that holds them."""

from collections import Counter

import pytest
import tiny_chat_model
import torch

from interp import steer
from interp.analyses.results.intervals import bootstrap
from interp.analyses.steer import check
from interp.analyses.steer.result import SettingComparisons, SteeringResult
from interp.errors import ScoreError, UsageError
from interp.hooks.edit.edit import Edits, steering
from interp.hooks.generate import Reply, generate
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts

EDIT = steer.Boost("mark", 9.0, heads="L0H1 L1H2")


@pytest.fixture(scope="module")
def model():
    return tiny_chat_model.model()


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    rows = [
        {
            "text": f"Number {i}: say yes or no.",
            "spans": {"mark": "say yes or no"},
            "meta": {"right": [" yes"], "wrong": [" no"], "question": f"{i}?", "answer": "yes"},
        }
        for i in range(5)
    ]
    return Prompts.encode(tiny_chat_model.tokenizer(), rows)


def judge(reply, prompt) -> bool:
    return len(set(reply)) % 2 == 0


def test_conditions():
    layout = HeadLayout(4, 4, 2)
    edit = steer.Boost("mark", 3.0, heads="L0H1 L2H3") + steer.ZeroTuning(2.0, heads="L1H1")
    rows = steer.steering_conditions(edit, layout, n_random_sets=2, seed=3)
    assert [row.name for row in rows] == ["baseline", "steered", *["random"] * 2, *["random by layer"] * 2]
    assert [row.draw for row in rows] == [0, 0, 0, 1, 0, 1]
    own = rows[1].heads
    assert len(own) == 3
    assert all(not row.heads & own for row in rows[2:4])
    by_layer = Counter(head.layer for head in own)
    assert all(Counter(head.layer for head in row.heads) == by_layer for row in rows[4:])
    # each part in as many heads as it has of its own
    assert all([len(part.chosen(layout)) for part in row.edits] == [2, 1] for row in rows[1:])
    assert rows[1].edits == edit
    assert not rows[0].edits.edits
    # no head is left to draw from
    assert len(steer.steering_conditions(steer.Boost("mark", 3.0), layout)) == 2
    # its vectors are those of its heads
    assert len(steer.steering_conditions(steer.Offset({"L0H1": [1.0] * 4}), layout)) == 2
    with pytest.raises(UsageError, match="n_random_sets=0"):
        steer.steering_conditions(edit, layout, n_random_sets=0)
    assert steer.describe(edit) == "Boost(factor=3.0) + ZeroTuning(gamma=2.0)"


def test_accuracy_is_that_of_the_replies_under_each_condition(model, prompts):
    trials = steer.steer_check(model, prompts, EDIT, judge=judge, max_new_tokens=6, n_random_sets=2, seed=3)
    assert trials.conditions == ("baseline", "steered", "random", "random by layer")
    conditions = steer.steering_conditions(EDIT, HeadLayout.of(model), 2, 3)
    for trial, condition in zip(trials.trials, conditions, strict=True):
        assert trial.heads == condition.heads
        with steering(model, condition.edits, prompts):
            replies = [reply.text for reply in generate(model, prompts, max_new_tokens=6)]
        assert list(trial.replies) == replies
        assert trial.values["accuracy"] == tuple(float(judge(r, p)) for r, p in zip(replies, prompts, strict=True))
    rows = [trial.values["accuracy"] for trial in trials.select("random")]
    assert len(rows) == 2
    mean, low, high = trials.mean("random")
    assert mean == sum(map(sum, rows)) / 10
    assert (low, high) == bootstrap(rows, seed=3)
    assert (trials.control, trials.n_random_sets) == ("random by layer", 2)
    rows = [trial.values["accuracy"] for trial in trials.select("random by layer")]
    steered, other = torch.tensor(trials.select("steered")[0].values["accuracy"]), torch.tensor(rows).mean(0)
    assert trials.gain("steered").mean == pytest.approx(float((steered - other).mean()))
    assert trials.gain("steered", over="baseline").mean == pytest.approx(
        trials.mean("steered").mean - trials.mean("baseline").mean
    )
    assert (trials.questions[3], trials.answers[3]) == ("3?", "yes")
    assert trials.intervention == "Boost(factor=9.0)"


@pytest.mark.parametrize(
    ("heads", "random", "by_layer"),
    [
        ("L0H1 L0H3", 3, 99),
        ("L0", 3, 0),  # no set of the same layer is another one
        ("L0 L1 L2 L3H0", 0, 99),  # the other three heads are too few for a set of other heads
        ("all", 0, 0),
    ],
)
def test_random_heads_are_drawn_as_far_as_there_are_others(heads, random, by_layer):
    layout = HeadLayout(4, 4, 2)
    rows = steer.steering_conditions(steer.Boost("mark", 3.0, heads=heads), layout)
    names = Counter(row.name for row in rows)
    assert (names["random"], names["random by layer"]) == (random, by_layer)
    if by_layer:
        drawn = [row.heads for row in rows if row.name == "random by layer"]
        # they are a test only if they may be, or share heads with, the steered ones
        assert any(heads & rows[1].heads for heads in drawn)
        again = steer.steering_conditions(steer.Boost("mark", 4.0, heads=heads), layout)
        assert [row.heads for row in again if row.name == "random by layer"] != drawn


@pytest.mark.parametrize(
    ("n_right", "n", "n_drawn"),
    [
        (2, 99, 39),  # no set is as accurate: one look after 39
        (1000, 99, 5),  # every set is as accurate: no verdict is possible after the fifth
        (2, 20, 20),  # too few for a verdict: all are drawn
    ],
)
@pytest.mark.parametrize("stop_early", [True, False])
def test_draws_end_where_the_verdict_is_certain(model, prompts, monkeypatch, n_right, n, n_drawn, stop_early):
    calls = []

    def replies(model, prompts, edits, **_):
        calls.append(edits)
        return iter([Reply((1,), "right" if 1 < len(calls) <= n_right else "wrong")] * len(prompts))

    monkeypatch.setattr(check, "steered_replies", replies)
    trials = steer.steer_check(
        model, prompts, EDIT, judge=lambda reply, prompt: reply == "right", n_random_sets=n, stop_early=stop_early
    )
    found = trials.set_test("steered")
    assert found.n_sets == len(trials.select("random by layer")) == (n_drawn if stop_early else n)
    assert found.n_planned == n
    assert found.is_beyond is (n_right == 2 and n == 99)
    if stop_early:
        assert found.p_value == {39: 1 / 40, 5: 1, 20: 1 / 21}[n_drawn]


def test_a_check_that_was_killed_continues(model, prompts, tmp_path, monkeypatch):
    settings = {"judge": judge, "max_new_tokens": 4, "n_random_sets": 1}
    whole = steer.steer_check(model, prompts, EDIT, **settings)
    calls, replies = [], check.steered_replies

    def killed(*args, **kw):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return replies(*args, **kw)

    monkeypatch.setattr(check, "steered_replies", killed)
    with pytest.raises(KeyboardInterrupt):
        steer.steer_check(model, prompts, EDIT, **settings, folder=tmp_path)
    again = steer.steer_check(model, prompts, EDIT, **settings, folder=tmp_path)
    assert len(calls) == 3 + 2
    assert again.trials == whole.trials
    # other replies are not taken for these
    steer.steer_check(model, prompts, EDIT, **settings | {"max_new_tokens": 5}, folder=tmp_path)
    assert len(calls) == 5 + 4


def test_settings_are_chosen_by_replies_then_by_score(model, prompts, tmp_path):
    sets = {"one": EDIT, "two": steer.Boost("mark", 50.0), "three": steer.Boost("mark", 0.1)}
    found = steer.choose(model, prompts, sets, judge=judge, max_new_tokens=5, folder=tmp_path)
    assert {each.name for each in found} == {"baseline", *sets}
    assert [(each.accuracy, each.score) for each in found] == sorted(
        ((each.accuracy, each.score) for each in found), reverse=True
    )
    for each in found:
        trials = steer.steer_check(model, prompts, each.edits, judge=judge, max_new_tokens=5, n_random_sets=1)
        assert each.accuracy == trials.mean("steered").mean
        assert each.edits == (Edits() + sets[each.name] if each.name in sets else Edits())
    scored = {each.name: each.score for each in steer.choose(model, prompts, sets)}
    assert scored == {each.name: each.score for each in found}

    def refused(*_):
        raise AssertionError("verdicts are read from the folder")

    assert steer.choose(model, prompts, sets, judge=refused, max_new_tokens=5, folder=tmp_path) == found
    stored = SettingComparisons(tuple(found))
    assert SettingComparisons.load(stored.save(tmp_path / "tried")) == stored
    assert stored.best == next(each.name for each in found if each.name != "baseline")
    assert stored["two"].edits == Edits() + sets["two"]
    assert list(stored.to_frame()["name"]) == [each.name for each in found]
    assert len(stored.summary().splitlines()) == 4
    with pytest.raises(UsageError, match="unknown setting 'four'; choose from"):
        stored["four"]


def test_a_result_is_stored_whole(model, prompts, tmp_path):
    trials = steer.steer_check(model, prompts, EDIT, judge=judge, max_new_tokens=3, n_random_sets=1)
    tried = tuple(steer.choose(model, prompts, {"top 2": EDIT}, judge=judge, max_new_tokens=3))
    profile = steer.profile(model, prompts, EDIT, start=5)
    edit = steer.edit_dicts(EDIT)
    made = SteeringResult("boost", edit, "mine", "top 2", trials, tried, profile.scores)
    again = SteeringResult.load(made.save(tmp_path / "steering"), model)
    assert again.edits == Edits() + EDIT
    assert again.tried == tried
    assert again.trials.trials == trials.trials
    assert again.profile is not None
    assert torch.equal(again.profile.per_prompt, profile.scores.per_prompt)
    assert again.summary() == made.summary()
    assert made.summary().startswith("Boost(factor=9.0) on mine, top 2\n")
    assert len(again.to_frame()) == len(trials.trials) * 5
    with pytest.raises(ScoreError):
        SteeringResult.load(tmp_path / "steering", tiny_chat_model.model(seed=1))
