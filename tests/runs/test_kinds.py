"""Kinds of ablation in a run: the tested heads under each, the thorough section, and the comparison of two tables."""

from dataclasses import replace

import pytest
import run_cases
import torch

from interp.analyses import identify, registry, tasks
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.report import render
from interp.runs.estimate import estimate
from interp.runs.inputs import RunInputs
from interp.runs.plan import ScorePlan
from interp.runs.run import Run

NEUTRAL = "loss on neutral text"


@pytest.fixture(scope="module")
def finished(model, tokenizer, tmp_path_factory):
    plan = run_cases.score_plan("induction", "retrieval", "set_difference", heads="", thorough=True)
    folder = tmp_path_factory.mktemp("run") / "whole"
    return plan, Run.open(folder, plan, model, tokenizer).finish(progress=False)


def test_a_run_shows_three_ablations_and_the_loss_on_neutral_text(finished):
    control = finished[1]["induction.control"]
    assert {"top", "top (mean)", "top (resample)", "top by depth"} <= set(control.tested)
    assert control.measures == ("loss on the second copy of repeated tokens", NEUTRAL)
    heads = {name: control.select(name)[0].heads for name in ("top", "top (mean)", "top (resample)")}
    assert len(set(heads.values())) == 1
    assert {trial.condition for trial in control.trials if NEUTRAL not in trial.values} == {"random", "random by layer"}
    # the reference is drawn with another seed than the prompts of the scores and of the test
    assert control.settings["kinds"] == ["zero", "mean", "resample"]


def test_a_thorough_run_has_random_sets_for_every_ablation(finished):
    profile = finished[1]["induction.profile"]
    assert profile.sizes("top (zero)") == (1, 2)
    for kind in ("zero", "mean", "resample"):
        test = profile.set_test(f"top ({kind})", size=2)
        assert test is not None
        assert (test.n_sets, test.decided) == (2, False)
    assert profile.units == dict.fromkeys(profile.measures, "nats per token")


def test_results_of_a_run_that_answers_nothing_are_missing_with_a_reason(finished):
    _, found = finished
    assert found.missing["set_difference"].startswith("no head scores above 0 in 'retrieval'")
    assert "no head scores above 0" in found.missing["retrieval.profile"]


def test_the_report_shows_them(finished):
    page = render(finished[1])
    for text in (
        "top (resample)",
        "by number of heads and kind of ablation",
        "Conditions that were not compared with random heads",
        NEUTRAL,
    ):
        assert text in page


def test_two_tables_are_compared_on_prompts_that_chose_neither(model, tokenizer):
    entry = registry.get("set_difference")
    layout, sizes = HeadLayout.of(model), run_cases.SIZES
    induction = identify.induction(model, standard.repeated()(sizes, tokenizer))
    retrieval = HeadScores("retrieval", torch.rand(2, layout.layers, layout.heads))
    scores = {"retrieval": retrieval, "induction": induction}
    given = {"set_difference": {"n_heads": 1}}
    inputs = RunInputs(model, tokenizer, layout, scores, HeadSet(()), [], sizes, given, n_heads=2, n_random_sets=2)
    made = entry.inputs(inputs)
    # a setting of the user is stronger than the run's
    assert (made["n_heads"], made["n_random_sets"], made["max_new_tokens"]) == (1, 2, sizes.reply_tokens)
    chosen = {prompt.ids for prompt in standard.repeated()(sizes, tokenizer)}
    assert not chosen & {prompt.ids for prompt in made["repeated"]}
    assert not {p.ids for p in standard.passages(sizes, tokenizer)} & {p.ids for p in made["neutral"]}
    trials = entry.thing(model, **made | {"n_heads": 2})
    assert {"only retrieval", "only induction"} <= set(trials.tested)
    page = render_of(trials)
    assert "Heads of retrieval against heads of induction" in page
    assert "beyond" in page


def render_of(trials):
    from run_results import run

    return render(replace(run(), results={"set_difference": trials, **run().results}))


def test_a_single_prompt_of_the_user_is_not_resampled(model, tokenizer, tmp_path):
    own = tasks.repeated(tokenizer, n=12, batch=1)
    plan = run_cases.score_plan("induction", heads="")
    found = Run.open(tmp_path / "run", plan, model, tokenizer, own).finish(progress=False)
    assert "top (mean)" in found["induction.control"].tested
    assert "top (resample)" not in found["induction.control"].tested


def test_plans_with_kinds(model, tokenizer):
    with pytest.raises(UsageError, match="unknown ablation 'half' in kinds; choose from zero, mean"):
        ScorePlan(kinds=("half",))
    with pytest.raises(UsageError, match="a thorough run tests heads under several ablations; give kinds"):
        ScorePlan(kinds=(), thorough=True)
    with pytest.raises(UsageError, match="a thorough run tests heads"):
        ScorePlan(check=False, thorough=True)
    plain = run_cases.score_plan("induction", heads="")
    more = replace(plain, thorough=True)
    costs = [{row.name: row.cost.tokens for row in estimate(plan, model, tokenizer).stages} for plan in (plain, more)]
    assert set(costs[1]) - set(costs[0]) == {"induction.profile"}
    assert costs[1]["induction.profile"] > costs[1]["induction.control"]
    fewer = {row.name: row.cost.tokens for row in estimate(replace(plain, kinds=()), model, tokenizer).stages}
    assert fewer["induction.control"] < costs[0]["induction.control"]
