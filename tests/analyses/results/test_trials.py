"""Trials: means, gains, selections, rows, tables and joins against numbers computed by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from interp.analyses.results import intervals
from interp.analyses.results.trial import Trial
from interp.analyses.results.trials import Trials
from interp.errors import ScoreError, UsageError
from interp.hooks.model.heads import HeadSet

TOP = HeadSet.parse("L0H1, L1H0")
MADE = Trials(
    "retrieval",
    (
        Trial("baseline", {"accuracy": (1.0, 1.0, 1.0, 0.0), "loss": (1.0, 2.0, 3.0, 4.0)}),
        Trial("top", {"accuracy": (0.0, 0.0, 1.0, 0.0), "loss": (2.0, 3.0, 4.0, 5.0)}, TOP, 2),
        Trial("random", {"accuracy": (1.0, 0.0, 1.0, 0.0), "loss": (1.0, 2.0, 3.0, 4.0)}, TOP, 2, 0),
        Trial("random", {"accuracy": (1.0, 1.0, 1.0, 0.0), "loss": (2.0, 3.0, 4.0, 5.0)}, TOP, 2, 1),
        Trial("top", {"loss": (9.0, 9.0, 9.0, 9.0)}, TOP, 4),
    ),
    intervention="zero",
    shares=("accuracy",),
    seed=5,
)


def test_names_and_sizes_are_in_the_order_of_the_trials():
    assert MADE.conditions == ("baseline", "top", "random")
    assert MADE.tested == ("top",)
    assert MADE.measures == ("accuracy", "loss")
    assert MADE.tasks == ("",)
    assert MADE.sizes("top") == (2, 4)
    assert MADE.sizes("random") == (2,)
    assert replace(MADE, control="top").tested == ()


def test_selections():
    assert [trial.draw for trial in MADE.select("random")] == [0, 1]
    assert MADE.select("top", 4) == MADE.trials[4:]
    for call, text in (
        (lambda: MADE.select("none"), "unknown condition 'none'; choose from 'baseline', 'top', 'random'"),
        (lambda: MADE.select("top"), "condition 'top' has the sizes 2, 4; name one as size="),
        (lambda: MADE.select("top", 3), "no trial of 'top' with heads 3 on any task; its sizes are 2, 4"),
        (lambda: MADE.select("top", 2, "qa"), "no trial of 'top' with heads 2 on qa"),
        (lambda: MADE.mean("baseline", "right"), "unknown measure 'right'; choose from 'accuracy', 'loss'"),
        (lambda: MADE.mean("top", "accuracy", size=4), "condition 'top' has no measure 'accuracy'"),
    ):
        with pytest.raises(UsageError, match=text):
            call()


def test_means_are_over_draws_and_prompts():
    assert MADE.mean("baseline").mean == 0.75
    assert MADE.mean("top", size=2).mean == 0.25
    assert MADE.mean("random").mean == (2 + 3) / 8
    assert MADE.mean("random", "loss").mean == (10 + 14) / 8
    rows = [(1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.0)]
    assert MADE.mean("random") == intervals.mean_over_draws(rows, seed=5)


def test_gains_are_prompt_by_prompt():
    # baseline has one size, which serves every size of the others
    gain = MADE.gain("top", "loss", size=2, over="baseline")
    # the differences are equal, so they determine no interval
    assert gain == pytest.approx((1.0, math.nan, math.nan), nan_ok=True)
    assert MADE.gain("top", "loss", size=4, over="baseline").mean == 9 - 2.5
    assert MADE.gain("baseline", "loss", over="top", size=2).mean == -1.0
    assert MADE.gain("baseline").mean == pytest.approx(0.75 - 5 / 8)
    gain = MADE.gain("top", size=2)
    # draws are averaged first: (1, 0.5, 1, 0)
    assert gain.mean == ((0 - 1) + (0 - 0.5) + (1 - 1) + 0) / 4
    assert gain == intervals.paired_difference(
        [(0.0, 0.0, 1.0, 0.0)], [(1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.0)], seed=5, bounds=intervals.SHARE_DIFFERENCE
    )
    with pytest.raises(UsageError, match="no trial of 'random' with heads 4"):
        MADE.gain("top", "loss", size=4)


TASKS = Trials(
    "kv",
    tuple(
        Trial(condition, {"right": tuple(map(float, values))}, size=size, task=task, draw=draw)
        for condition, size, task, draw, values in (
            ("baseline", 1.0, "qa", 0, "1111"),
            ("baseline", 1.0, "code", 0, "10"),
            ("snapkv", 0.5, "qa", 0, "1100"),
            ("snapkv", 0.5, "code", 0, "11"),
            ("random", 0.5, "qa", 0, "1000"),
            ("random", 0.5, "qa", 1, "0100"),
            ("random", 0.5, "code", 0, "00"),
            ("random", 0.5, "code", 1, "10"),
        )
    ),
    size_name="share of keys",
)


def test_tasks_have_the_same_weight():
    assert TASKS.tasks == ("qa", "code")
    assert TASKS.mean("snapkv").mean == (0.5 + 1.0) / 2
    assert TASKS.mean("snapkv") == intervals.pooled_mean([[1, 1, 0, 0], [1, 1]])
    assert TASKS.mean("random").mean == (0.25 + 0.25) / 2
    assert TASKS.mean("random", task="code").mean == 0.25
    assert TASKS.gain("snapkv").mean == pytest.approx((0.25 + 0.75) / 2)
    assert TASKS.gain("snapkv", task="qa").mean == 0.25
    assert TASKS.gain("snapkv", over="baseline").mean == (-0.5 + 0.5) / 2


def test_measures_with_an_interval_of_their_own():
    angles = [3.0, 5.0, 10.0]
    trials = [Trial("random", {"degrees": (x,)}, TOP, 2, i, intervals={"degrees": (x - 1, x + 2)}) for i, x in
              enumerate(angles)]  # fmt: skip
    made = Trials(
        "sahara", (Trial("sahara", {"degrees": (20.0,)}, TOP, 2, intervals={"degrees": (18.0, 25.0)}), *trials)
    )
    assert made.mean("sahara") == (20.0, 18.0, 25.0)
    assert made.mean("random") == (6.0, 3.0, 10.0)
    # one number is no sample of prompts, so there is no gain
    assert all("gain" not in row for row in made.rows())


def test_rows_hold_gains_where_there_is_a_control():
    rows = MADE.rows()
    assert [(row["condition"], row["size"], row["measure"]) for row in rows] == [
        ("baseline", 0, "accuracy"), ("baseline", 0, "loss"), ("top", 2, "accuracy"), ("top", 2, "loss"),
        ("top", 4, "loss"), ("random", 2, "accuracy"), ("random", 2, "loss"),
    ]  # fmt: skip
    assert [row for row in rows if "gain" in row] == rows[2:4]
    assert rows[2]["gain"] == MADE.gain("top", size=2).mean
    assert rows[2]["gain_low"] == MADE.gain("top", size=2).low
    assert (rows[0]["mean"], rows[0]["low"], rows[0]["high"]) == MADE.mean("baseline")
    assert MADE.rows("accuracy") == [row for row in rows if row["measure"] == "accuracy"]
    assert [row["mean"] for row in TASKS.rows(task="code")] == [0.5, 1.0, 0.25]
    with pytest.raises(UsageError, match="unknown measure 'x'"):
        MADE.rows("x")


def test_the_long_table():
    frame = MADE.to_frame()
    assert list(frame) == ["condition", "task", "size", "draw", "heads", "measure", "prompt", "value"]
    assert len(frame) == 4 * 9
    means = frame.groupby(["condition", "size", "measure"]).value.mean()
    for row in MADE.rows():
        assert means[row["condition"], row["size"], row["measure"]] == pytest.approx(row["mean"])
    assert set(frame[frame.condition == "baseline"].heads) == {""}
    assert set(frame[frame.condition == "top"].heads) == {"L0H1, L1H0"}


def test_the_summary_has_one_line_a_row():
    lines = MADE.summary().splitlines()
    assert len(lines) == len(MADE.rows())
    mean, low, high = MADE.mean("top", size=2)
    gain = MADE.gain("top", size=2)
    own = f"top 2 accuracy {mean:.0%} [{low:.0%}, {high:.0%}]"
    over = f"difference from random: {100 * gain.mean:+.0f} points [{100 * gain.low:+.0f}, {100 * gain.high:+.0f}]"
    assert lines[2].split() == f"{own} {over}".split()
    assert lines[4].endswith("9.000")
    assert str(MADE) == MADE.summary()
    assert TASKS.summary().splitlines()[1].split()[:2] == ["snapkv", "50%"]


def test_batches_of_prompts_follow_one_another():
    first, second = (
        Trials(
            "kv",
            (Trial("top", {"loss": values}, TOP, 2, replies=replies, facts={"kept": kept}),),
            questions=replies,
            answers=replies,
        )
        for values, replies, kept in (((1.0,), ("a",), 0.2), ((2.0, 3.0), ("b", "c"), 0.5))
    )
    both = Trials.concat([first, second])
    assert both.trials == (
        Trial("top", {"loss": (1.0, 2.0, 3.0)}, TOP, 2, replies=("a", "b", "c"), facts={"kept": (0.2 + 2 * 0.5) / 3}),
    )
    assert both.questions == both.answers == ("a", "b", "c")
    assert Trials.concat([first]).trials == first.trials


def test_tasks_stay_apart_when_joined():
    qa, code = (replace(TASKS, trials=tuple(t for t in TASKS.trials if t.task == task)) for task in TASKS.tasks)
    both = Trials.concat([qa, code])
    assert sorted(map(repr, both.trials)) == sorted(map(repr, TASKS.trials))
    assert both.mean("snapkv") == TASKS.mean("snapkv")


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="no trials to join; give at least one part"):
        Trials.concat([])
    for change, text in (
        ({"name": "x"}, "differ in name"),
        ({"intervention": "mean"}, "differ in intervention"),
        ({"seed": 1}, "differ in seed"),
        ({"trials": MADE.trials[4:]}, "differ in measures"),
    ):
        with pytest.raises(UsageError, match=f"trials {text}.*join parts of one experiment"):
            Trials.concat([MADE, replace(MADE, **change)])
    angle = Trials("x", (Trial("top", {"degrees": (1.0,)}, intervals={"degrees": (0.0, 2.0)}),))
    with pytest.raises(UsageError, match="hold intervals; join batches of prompts only"):
        Trials.concat([angle, angle])
    other = replace(MADE, trials=(replace(MADE.trials[1], heads=HeadSet.parse("L0H0")), *MADE.trials[2:]))
    with pytest.raises(UsageError, match="trials of 'top' differ in heads or measures"):
        Trials.concat([MADE, other])


def test_what_holds_no_numbers_is_refused():
    with pytest.raises(UsageError, match="'x' are empty; give at least one trial"):
        Trials("x", ())
    for values in ({}, {"loss": ()}):
        with pytest.raises(UsageError, match="the trial 'top' of 'x' has no numbers; give one for each prompt"):
            Trials("x", (Trial("top", values),))
    with pytest.raises(ScoreError, match="settings of 'x' cannot be written as JSON"):
        Trials("x", MADE.trials, settings={"a": print})
    # JSON knows lists only, and what was stored compares equal to what was made
    assert Trials("x", MADE.trials, settings={"sizes": (1, 2)}).settings == {"sizes": [1, 2]}


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    made = Trials("x", (Trial("top", {"loss": (math.nan, math.inf)}),))
    again = Trials.load(made.save(tmp_path / "x"))
    assert str(again.trials[0].values) == str(made.trials[0].values)


def _of_sets(tested: float, random: list[float], **more: Any) -> Trials:
    heads = HeadSet.parse("L0H1")
    sets = [Trial("random by layer", {"loss": (x, x + 0.1)}, heads, 1, i, matched="top") for i, x in enumerate(random)]
    free = Trial("random", {"loss": (9.0, 9.0)}, heads, 1, matched="top")
    base, top = Trial("baseline", {"loss": (1.0, 1.1)}), Trial("top", {"loss": (tested, tested + 0.1)}, heads, 1)
    settings: dict[str, Any] = {"claim": "larger effect", **more}
    return Trials("made", (base, top, free, *sets), control="random by layer", **settings)


def test_a_head_set_is_compared_with_sets_matched_by_layer():
    test = _of_sets(3.0, [1.0 + 0.01 * i for i in range(99)]).set_test("top")
    assert test is not None
    assert (test.n_beyond, test.n_sets, test.p_value, test.is_beyond) == (99, 99, 0.01, True)
    assert test.difference == pytest.approx(3.0 - 1.49)
    assert test.deviations == pytest.approx(1.51 / stats.tstd([0.01 * i for i in range(99)]))
    row = next(row for row in _of_sets(3.0, [1.0, 3.5]).rows() if row["condition"] == "top")
    assert (row["n_sets"], row["n_beyond"], row["p_value"]) == (2, 1, 2 / 3)
    assert _of_sets(3.0, [1.0], claim=None).set_test("top") is None


def test_random_sets_of_other_rankings_do_not_count():
    made = _of_sets(3.0, [1.0] * 3)
    foreign = [replace(trial, matched="other", values={"loss": (99.0, 99.0)}) for trial in made.trials[3:]]
    both = replace(made, trials=(*made.trials, *foreign))
    assert both.set_test("top") == made.set_test("top")
    assert both.gain("top") == made.gain("top")


def test_draws_that_ended_early_have_the_p_value_of_besag_and_clifford():
    # the fifth set that is at least as extreme ends 99 planned draws
    made = _of_sets(2.0, [3.0, 1.0, 3.0, 1.0, 3.0, 3.0, 3.0], n_random_sets=99)
    test = made.set_test("top")
    assert test is not None
    assert (test.p_value, test.ended_early, test.decided, test.is_beyond) == (5 / 7, True, True, False)


def test_a_set_is_tested_by_the_mean_over_tasks():
    """A task of 1 prompt and one of 9 have the same weight, under every condition."""

    def trials(condition: str, few: float, many: float, **more: Any) -> list[Trial]:
        rows = {"few": (few,), "many": (many,) * 9}
        return [Trial(condition, {"loss": row}, task=task, **more) for task, row in rows.items()]

    made = trials("baseline", 0.0, 0.0) + trials("top", 1.0, 0.0, heads=TOP, size=2)
    for draw in range(39):
        made += trials("random by layer", 0.0, 0.6, heads=TOP, size=2, draw=draw)
    result = Trials("many tasks", tuple(made), control="random by layer", claim="larger effect", n_random_sets=39)
    test = result.set_test("top", size=2)
    assert test is not None
    # by the number of prompts the means are 0.1 and 0.54
    assert test.difference == pytest.approx(0.5 - 0.3)
    assert (test.n_beyond, test.is_beyond) == (39, True)


def test_findings_hold_for_all_comparisons_together():
    """A condition whose interval excludes 0 alone is no finding among many."""
    shift = [0.1, 0.3, -0.1, 0.2, 0.4, -0.2, 0.5, 0.1, 0.3, 0.0]
    others = [Trial(f"c{i}", {"loss": tuple(x if i == 0 else 0.3 * (-1) ** n for n, x in enumerate(shift))}, TOP, 2)
              for i in range(20)]  # fmt: skip
    control = Trial("random", {"loss": (0.0,) * len(shift)}, TOP, 2)
    alone, among = (Trials("many", (control, *others[:n])) for n in (1, 20))
    assert alone.findings() == (("c0", 2),)
    assert among.gain("c0").excludes_zero
    assert not among.gain("c0", n_comparisons=20).excludes_zero
    assert among.findings() == ()


@pytest.mark.parametrize(("short", "found"), [(9, ()), (10, (("top", 2),))])
def test_a_share_needs_ten_prompts_of_every_task(short, found):
    def trial(condition: str, value: float, task: str, n: int, size: int = 2) -> Trial:
        return Trial(condition, {"accuracy": (value,) * n}, TOP, size, task=task)

    made = [
        trial(*each, task, n)
        for task, n in (("long", 30), ("short", short))
        for each in (("top", 0.0), ("random", 1.0))
    ]
    assert Trials("tasks", tuple(made), shares=("accuracy",)).findings() == found
