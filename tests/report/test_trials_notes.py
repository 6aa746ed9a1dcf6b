"""Trials in a report: names of conditions and measures are explained, and columns are those that hold something."""

from dataclasses import replace
from typing import Any

import pytest
from html_page import Page
from run_results import ablation, curve, influence, kept_keys, run

import interp.plots
from interp.analyses.causal.ablated_measures import NEUTRAL
from interp.analyses.results.trial import OF_TESTED_SET, Trial
from interp.analyses.results.trials import Trials
from interp.report import render
from interp.report.trials_notes import condition_notes, has_interval, heads_column, measure_notes, sized
from interp.report.trials_tables import by_prompt, replies, table
from interp.report.trials_words import trials_words

plots: Any = interp.plots
RANDOM_NOTES = [
    "random by layer: random sets matched by layer, with as many heads of each layer as the tested heads.",
    "random: random sets of other heads, from all layers.",
]
BY_DEPTH = (
    "by depth: 2 heads chosen by layer. First come all heads of the layer with the highest mean score, then those of "
    "the layer with the next highest; of the last layer used, as many as are needed are chosen at random."
)
NAMED = {
    ("top",): ["top: the 2 heads under test, zero-ablated."],
    ("top", "top (mean)", "top (resample)"): [
        "top: the 2 heads under test, zero-ablated.",
        "(mean), (resample): the same heads under another ablation.",
    ],
    ("top", "top kept", "top kept (mean)", "top by depth"): [
        "top: the 2 heads with the highest scores, zero-ablated.",
        "(mean): the same heads under another ablation.",
        "kept: the tested heads stay, and the other heads above the threshold of the scores are ablated (above the "
        "lowest score, where the scores have no threshold).",
        BY_DEPTH,
    ],
    ("induction", "induction by depth"): [BY_DEPTH],
}


def named(*names: str, values: tuple[float, ...] = (1.0, 2.0, 3.0), **about: Any) -> Trials:
    """Trials with tested conditions of these names."""
    trials = [Trial("baseline", {"loss": values}), *(Trial(name, {"loss": values}, size=2) for name in names)]
    return Trials("made", tuple(trials), "zero", **about)


@pytest.mark.parametrize("names", NAMED)
def test_each_part_of_a_name_is_explained_where_it_occurs(names):
    assert condition_notes(named(*names)) == NAMED[names]
    page = Page(render(run({"made": named(*names)}))).words
    assert all(note in page for note in NAMED[names])


@pytest.mark.parametrize(
    ("name", "ablated"),
    [
        ("retrieval", "above the threshold of the scores are ablated."),
        ("induction", "above the threshold of the scores are ablated."),
        ("path_patching", "above the lowest score are ablated, since the scores have no threshold."),
    ],
)
def test_the_heads_that_are_ablated_where_the_tested_ones_stay_depend_on_a_threshold(name, ablated):
    notes = condition_notes(replace(named("top kept"), name=name))
    assert f"kept: the tested heads stay, and the other heads {ablated}" in notes


def test_random_heads_are_explained():
    assert condition_notes(ablation())[1:] == RANDOM_NOTES
    assert condition_notes(curve()) == RANDOM_NOTES
    assert condition_notes(kept_keys(16)) == []


def test_sizes_are_counted():
    assert [sized(ablation(), n) for n in (1, 3)] == ["1 head", "3 heads"]
    assert sized(kept_keys(16), 0.4) == "40%"


def losses(*counts: int) -> Trials:
    """A loss of the prompts, and one of plain texts."""
    values = {"loss": (4.0, 4.5, 5.0, 4.2), NEUTRAL: tuple(3.0 + i for i in range(counts[0]))}
    return Trials("made", (Trial("baseline", values), Trial("top", values, size=1)), "zero")


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_each_loss_has_its_texts_and_a_few_of_them_no_interval(n):
    made = losses(n)
    texts = "that of 1 plain text that is" if n == 1 else f"mean over {n} plain texts that are"
    notes = measure_notes(made)
    assert notes[:2] == [
        "Loss: mean over the 4 texts of this test.",
        f"Loss on neutral text: {texts} not among the texts of this test, the same in all tests of the run.",
    ]
    intervals = {row["measure"]: bool(row["interval"]) for row in table(made)}
    assert intervals == {"loss": True, NEUTRAL: n >= 3}
    assert has_interval(made, NEUTRAL) == (n >= 3)
    too_few = "a single text is" if n == 1 else f"{n} texts are"
    end = [f"The table has no interval of the loss on neutral text, since {too_few} too few for one."]
    assert notes[2:] == (end if n < 3 else [])


def test_a_share_and_a_stored_interval_keep_their_interval():
    share = Trials("made", (Trial("baseline", {"accuracy": (1.0, 0.0)}),), shares=("accuracy",))
    stored = Trials("made", (Trial("baseline", {"degrees": (2.0,)}, intervals={"degrees": (1.0, 3.0)}),))
    assert has_interval(share, "accuracy")
    assert table(share)[0]["interval"]
    assert has_interval(stored, "degrees")
    assert table(stored)[0]["interval"] == "1.000 to 3.000"


@pytest.mark.parametrize(
    ("intervention", "column"),
    [("zero", "Ablated heads"), ("mean", "Ablated heads"), ("ablations: zero, mean", "Ablated heads"),
     ("Boost of the answer", "Edited heads")],
)  # fmt: skip
def test_the_column_of_heads_states_what_is_done_to_them(intervention, column):
    made = replace(named("top"), intervention=intervention)
    assert heads_column(made) == column
    assert f"95 % interval {column}" in Page(render(run({"made": made}))).words


def test_the_column_of_right_answers_is_there_where_answers_are_counted():
    assert "Measure Answered right Mean" in Page(render(run({"made": ablation()}))).words
    assert "Measure Mean" in Page(render(run({"made": named("top")}))).words


def test_a_single_random_set_is_counted_as_one():
    made = ablation((8, 1, 8, 6, 7))
    assert [row["condition"] for row in table(made)][2:] == ["random (2 sets)", "random by layer (1 set)"]
    names = [name for reply in replies(made) for name, _, _ in reply["rows"]]
    assert any("random by layer (1 set)" in name for name in names)


def test_prompts_are_listed_with_their_order():
    found = by_prompt(influence())
    assert found is not None
    assert found["note"] == (
        "The prompts are sorted by the column heads, highest first. The column random holds the mean over the random "
        "sets."
    )


@pytest.mark.parametrize(
    ("title", "measure", "drawn"),
    [
        ("Accuracy with heads ablated", "accuracy", "Accuracy with heads ablated"),
        ("Accuracy with heads ablated", NEUTRAL, "Loss on neutral text with heads ablated"),
        ("Loss with heads ablated", "loss on the second copy", "Loss on the second copy with heads ablated"),
        ("Loss with heads ablated, by number", "loss", "Loss with heads ablated, by number"),
        ("Causal curve", "loss", "Causal curve: loss"),
    ],
)
def test_a_title_names_each_measure_once(title, measure, drawn):
    values = {measure: (1.0, 2.0), "other": (1.0, 2.0)}
    made = Trials("made", (Trial("baseline", values), Trial("top", values, size=1)), "zero", title)
    assert plots.trials(made, measure).layout.title.text == drawn


def test_another_ablation_is_named_in_the_subtitle():
    assert "zero ablation unless named otherwise" in plots.figure(named("top", "top (mean)")).layout.title.subtitle.text
    assert "unless" not in plots.figure(named("top", "top kept")).layout.title.subtitle.text


@pytest.mark.parametrize(("shared", "is_weak"), [(0, False), (0.9, False), (1, True), (2, True)])
def test_a_test_whose_random_sets_share_most_heads_has_little_power(shared, is_weak):
    trials = [
        replace(trial, size=2 if trial.size else 0)
        for trial in ablation((12, 9, 11, 11, *[9] * 39), n_prompts=12).trials
    ]
    made = replace(
        ablation(),
        trials=tuple(
            replace(trial, facts={OF_TESTED_SET: shared}) if trial.condition == "random by layer" else trial
            for trial in trials
        ),
        n_random_sets=39,
    )
    words = trials_words(made)
    assert words[0].startswith("Not distinguishable from random heads: 39 of 39 random sets have as large an effect")
    weak = f" The random sets share {shared:.1f} of the 2 tested heads on average, so the test has little power."
    assert words[0].endswith(weak) == is_weak


@pytest.mark.parametrize("shared", [0, 1])
def test_a_larger_effect_states_that_random_sets_may_contain_tested_heads(shared):
    made = ablation((12, 1, 11, 11, *[10, 11] * 20), n_prompts=12)
    trials = tuple(replace(t, facts={OF_TESTED_SET: shared}) for t in made.trials)
    words = trials_words(replace(made, trials=trials, n_random_sets=40))
    (found,) = [sentence for sentence in words if sentence.startswith("The top heads have a larger effect than all 40")]
    assert found.endswith("A set matched by layer may contain some of the tested heads.") == bool(shared)


def test_draws_that_end_after_39_sets_state_why():
    made = replace(ablation((12, 1, 11, 11, *[10, 11, 12] * 13), n_prompts=12), n_random_sets=99)
    (found,) = [sentence for sentence in trials_words(made) if sentence.startswith("The top heads")]
    assert found.endswith(
        "Drawing stopped at the planned check after 39 of 99 sets: none of them had as large an effect (p = 1/40)."
    )
