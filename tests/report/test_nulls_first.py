"""A null is the first sentence wherever trials are shown."""

from dataclasses import replace

import pytest
from html_page import Page
from run_results import ablation, curve, kept_keys, run

from interp.report import render
from interp.report.trials_words import trials_words

FEW_SETS = (12, 1, 11, 11, *[10] * 3)
BEYOND, NOT_BEYOND = ((12, 1, 11, 11, *[10] * 99), (12, 9, 11, 11, *[9] * 99))


@pytest.mark.parametrize(
    ("right", "n_prompts", "first"),
    [
        (NOT_BEYOND, 12, "Not distinguishable from random heads: 99 of 99 random sets have as large an effect"),
        (FEW_SETS, 12, "3 random head sets allow no verdict; at least 39 are needed."),
        ((8, 1, 8, 8, *[7] * 99), 8, "There is no verdict about shares of fewer than 10 prompts."),
        ((0, 0, 0, 0, *[0] * 99), 12, "Nothing could be lost"),
        (BEYOND, 12, "Baseline accuracy: 100%."),
    ],
)
def test_an_ablation_test_begins_with_its_null(right, n_prompts, first):
    trials = ablation(right, n_prompts=n_prompts)
    words = trials_words(trials)
    assert words[0].startswith(first)
    assert sum(sentence.startswith(first) for sentence in words) == 1
    page = Page(render(run({"retrieval": trials}))).words
    assert first in page


def test_curves_that_random_heads_equal_begin_with_it():
    made = curve()
    same = tuple(
        replace(trial, values={"loss": tuple(value + 0.15 * trial.size for value in made.trials[0].values["loss"])})
        if trial.condition == "induction" else trial
        for trial in made.trials
    )  # fmt: skip
    both = tuple(replace(trial, condition="other") for trial in same if trial.condition == "induction")
    sets = tuple(replace(trial, matched="other") for trial in made.trials if trial.condition == "random by layer")
    words = trials_words(replace(made, trials=(*same, *both, *sets)))
    assert words[0].startswith("No condition is distinguishable from")


def test_a_difference_whose_interval_includes_0_is_a_null():
    trials = replace(ablation((8, 8, 8, 8, 8, 8), n_prompts=12), claim=None)
    words = trials_words(trials)
    assert words[0].startswith("Not distinguishable from random: the difference")
    assert "the 95\u00a0% interval includes 0" in words[0]


def test_selectors_that_random_keys_equal_begin_with_it():
    assert trials_words(kept_keys(16))[0].startswith("Baseline right")
    made = kept_keys(16)
    random = {(trial.task, trial.size): trial.values for trial in made.trials if trial.condition == made.control}
    same = tuple(replace(trial, values=random.get((trial.task, trial.size), trial.values)) for trial in made.trials)
    words = trials_words(replace(made, trials=same))
    assert words[0] == "No condition is distinguishable from random (4 comparisons)."
