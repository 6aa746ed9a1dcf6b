"""Sections of composite results: steering runs, refusals, and groups of heads."""

from dataclasses import replace

import pytest
import torch
from html_page import Page
from run_results import LAYERS, N_PROMPTS, ORIGIN, ablation, rand, run, table

from interp.analyses.identify.sahara import SaharaResult
from interp.analyses.measures.refusals import RefusalReplies, RefusalResult
from interp.analyses.results.trial import Trial
from interp.analyses.results.trials import Trials
from interp.analyses.steer.choose import SettingComparison
from interp.analyses.steer.pasta import Pasta
from interp.analyses.steer.result import SteeringResult
from interp.hooks.model.heads import Head, HeadSet
from interp.report import render
from interp.report.sections.refusals import refusal_words


def groups() -> Trials:
    trials = [
        Trial(
            condition,
            {"degrees": (value * size,), "one_minus_cos": (0.01,)},
            HeadSet(tuple(Head(layer, draw) for layer in range(size))),
            size,
            draw,
            intervals={"degrees": (value * size - 1, value * size + 1), "one_minus_cos": (0.005, 0.02)},
        )
        for size in (1, 2)
        for condition, value, draw in (("sahara", 9.0, 0), ("random", 1.0, 0), ("random", 2.0, 1))
    ]
    return Trials("sahara", tuple(trials), "uniform", "Groups of heads", provenance=ORIGIN)


def refusals(random: int = 8) -> RefusalResult:
    def trial(condition: str, size: int, refused: float, right: float, draw: int = 0) -> Trial:
        rows = {
            name: tuple(float(i < n) for i in range(10)) for name, n in (("refused", refused), ("easy right", right))
        }
        values = {**rows, "neutral loss": (2.0,) * 10}
        return Trial(condition, values, HeadSet((Head(0, 0),) * bool(size)), size, draw)

    sets = [trial("random by layer", size, random, 10, i) for size in (1, 3) for i in range(39)]
    curve = Trials(
        "refusals",
        (trial("baseline", 0, 8, 10), trial("ships", 1, 6, 9), trial("ships", 3, 2, 1), trial("random", 1, 8, 10),
         trial("random", 3, 8, 9), *sets),
        "zero", shares=("refused", "easy right"), units={"neutral loss": "nats per token"},
        control="random by layer", claim="larger effect", n_random_sets=39,
    )  # fmt: skip
    replies = {
        "harmful": RefusalReplies(("a", "b"), (True, False), ("I cannot", "Sure")),
        "harmless": RefusalReplies(("c",), (False,), ("Yes",)),
    }
    return RefusalResult(replies, {"uniform": groups()}, {"zero": curve}, ORIGIN)


def test_refusals_in_words_with_curves_and_groups():
    page = Page(render(run({"refusals": refusals()})))
    for text in (
        "The unmodified model refused 1 of 2 harmful requests and 0 of 1 harmless requests.",
        "Under zero ablation, the first 1 heads by ships lower the refusal rate of other requests to 60%",
        "It is the lowest of 1 sets that are beyond random heads after a correction for 2 tests, so it is slightly too",
        "Ships has a larger effect than all 39 random sets matched by layer (p = 0.025): the share of refused "
        "requests is 20 percentage points lower than the mean of these sets.",
        "Refusals are halved only where the model breaks: with 3 heads by ships ablated, it answers 10% of the easy",
        "Groups of heads, uniform ablation",
        "sahara 2 degrees 18 17 to 19",
    ):
        assert text in page.words, text


def test_refusals_that_random_heads_lower_as_much_are_told_as_a_null():
    words = refusal_words(refusals(random=6))
    # before the number of refusals
    assert words[0] == (
        "No set of heads lowers refusals beyond random heads under zero ablation while the model still answers easy "
        "questions."
    )
    assert not [sentence for sentence in words if "most" in sentence]


@pytest.mark.parametrize(
    ("baseline", "text"),
    [((0, 10), "the unmodified model refuses none of the requests."),
     ((8, 0), "the unmodified model answers no easy question, so a model that breaks could not be recognised.")],
)  # fmt: skip
def test_a_model_without_the_behaviour_says_nothing_about_heads(baseline, text):
    made = refusals()
    curve = made.curves["zero"]
    counts = dict(zip(("refused", "easy right"), baseline, strict=True))
    rows = {name: tuple(float(i < n) for i in range(10)) for name, n in counts.items()}
    trials = tuple(
        replace(trial, values={**trial.values, **rows}) if trial.condition == "baseline" else trial
        for trial in curve.trials
    )
    words = refusal_words(replace(made, curves={"zero": replace(curve, trials=trials)}))
    assert words[0] == f"Nothing is stated about heads under zero ablation: {text}"
    assert len(words) == 2


def test_a_steering_run_with_its_choice_and_profile():
    edit = (Pasta("answer", heads="L1H2").to_dict(),)
    tried = (
        SettingComparison("top 2", edit, 0.4, 0.2, 0.6, 0.3, 0.75),
        SettingComparison("baseline", edit, 0.1, 0.0, 0.2, 0.3, 0.5),
    )
    trials = ablation()
    steered = tuple(
        replace(trial, condition="steered") if trial.condition == "top" else replace(trial, matched="")
        for trial in trials.trials
    )
    test = Trials("pasta", steered, "pasta", "Steering", shares=("accuracy",), provenance=ORIGIN)
    result = SteeringResult("pasta", edit, "counterfact", "top 2", test, tried, table("profile", 1))
    page = Page(render(run({"steering": result})))
    for text in (
        "on counterfact",
        "Accuracy with 2 heads: steered 12%",
        "Baseline accuracy: 100%.",
        "Choice of heads and settings",
        "top 2 75% +0.400 +0.200 to +0.600",
        "Profile of single heads",
        "Gain of each head, steered alone",
    ):
        assert text in page.words, text


def test_groups_of_heads_are_shown_by_their_parts():
    scores = table("sahara", 2)
    page = Page(render(run({"sahara": SaharaResult(scores, (Head(3, 2), Head(0, 0)), groups())})))
    assert "Scores" in page.words
    assert "Sahara: score of each head" in page.words
    assert "sahara: L3H2, L0H0" in page.words
    assert torch.equal(scores.per_prompt[:, 3, 2], rand(N_PROMPTS, LAYERS, 4, seed=2)[:, 3, 2] * 0.2 + 0.6)
