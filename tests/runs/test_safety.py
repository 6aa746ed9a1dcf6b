"""Safety runs on a model that refuses by one planted head, and on one that does not refuse."""

from dataclasses import replace

import pytest
import run_cases
import tiny_chat_model
import torch

import interp
from interp.errors import PromptError, RunError, UsageError
from interp.hooks.model.heads import Head
from interp.runs import safety
from interp.runs.results import read_results, result_path
from interp.runs.run import Run
from interp.runs.safety import SafetyPlan
from interp.runs.stages.refusals import Refusals
from interp.testing import planted

SMALL = {"ablations": ("zero",), "head_set_sizes": (1,), "group_size": 1}


@pytest.fixture
def requests(tmp_path):
    return run_cases.requests_file(tmp_path / "requests.csv")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(planted model, results) of a run with both ablations."""
    place = tmp_path_factory.mktemp("safety")
    made = planted.refusing(0, "llama")
    plan = run_cases.safety_plan(run_cases.requests_file(place / "requests.csv"))
    return made, Run.open(place / "run", plan, made.model, run_cases.refusing_tokenizer()).finish(progress=False)


def started(folder, plan, model=None):
    return Run.open(folder, plan, model or planted.refusing(0, "llama").model, run_cases.refusing_tokenizer())


def test_the_planted_head_is_found_and_ablating_it_ends_refusals(whole):
    made, results = whole
    found = results["refusals"]
    assert sum(found.replies["harmful"].refused) == 24
    assert not any(found.replies["harmless"].refused)
    assert set(results.scores) == {"gradient_importance", "ships.uniform", "ships.zero"}
    for name, scores in results.scores.items():
        assert scores.top(1) == [Head(*made.head)], name
    slopes = results.scores["gradient_importance"]
    # ranked by the sign, with the absolute slopes next to it
    assert float(slopes.values.min()) < 0 < float(slopes.values.max())
    assert torch.equal(slopes.per_prompt.abs(), slopes.extras["absolute"])
    for curve in found.curves.values():
        assert curve.mean("baseline", measure="refused")[0] == 1
        for ranking in ("ships", "sahara", "gradient"):
            assert curve.mean(ranking, measure="refused", size=1)[0] == 0
        assert curve.mean("random", measure="refused", size=1)[0] == 1
        # every ranking ends where refusals end, so no set of two heads is needed
        assert curve.sizes("random") == curve.sizes("random by layer") == (1,)
        for trial in curve.select("random by layer", 1):
            assert all(value == (Head(*made.head) not in trial.heads) for value in trial.values["refused"])
        assert curve.measures == ("refused", "harmless refused", "easy right", "neutral loss")
    assert set(found.groups) == set(found.curves) == {"uniform", "zero"}
    for group in found.groups.values():
        assert {"random", "random by layer"} <= set(group.conditions)


def test_replies_are_kept_by_their_beginnings(whole, tmp_path, requests):
    _, results = whole
    assert max(map(len, results["refusals"].replies["harmful"].begins)) <= 40
    plan = run_cases.safety_plan(requests, keep_text=True, **SMALL)
    found = started(tmp_path / "run", plan, planted.refusing(0, "gpt2").model).finish(progress=False)
    assert found["refusals"].replies["harmful"].begins[0].startswith(run_cases.REFUSAL)


@pytest.mark.parametrize(("n_harmful", "scored", "tested"), [(24, 8, 8), (12, 6, 6), (9, 4, 5)])
def test_heads_are_never_tested_on_the_requests_they_were_found_on(tmp_path, requests, n_harmful, scored, tested):
    plan = run_cases.safety_plan(requests, n_harmful=n_harmful, **SMALL)
    run = started(tmp_path / "run", plan)
    run.finish(progress=False)
    refusals = Refusals.of(plan, run.model, run.tokenizer)
    found, others = refusals._split(run)
    assert (len(found.prompts), len(others.prompts)) == (scored, tested)
    assert not {prompt.ids for prompt in found.prompts} & {prompt.ids for prompt in others.prompts}


def test_a_model_that_does_not_refuse_has_nothing_to_attribute(tmp_path):
    plan = SafetyPlan(n_harmful=12, n_harmless=8, reply_tokens=2)
    run = Run.open(tmp_path / "run", plan, tiny_chat_model.model(), tiny_chat_model.tokenizer())
    with pytest.raises(UsageError, match="no refusal to attribute to heads"):
        run.finish(progress=False)
    assert not list((tmp_path / "run" / "results").glob("ships*"))
    with pytest.raises(RunError, match="no finished result yet"):
        read_results(tmp_path / "run")


PLANS = {
    "no ablation": ({"ablations": ()}, "choose uniform, zero, or both"),
    "unknown ablation": ({"ablations": ("mean",)}, "unknown ablation mean"),
    "random sets": ({"n_random_sets": 0}, "n_random_sets=0 is too small"),
    "scored": ({"n_scored": 1}, "n_scored=1 is too small"),
    "sizes": ({"head_set_sizes": ()}, "head_set_sizes"),
    "zero heads": ({"head_set_sizes": (0, 1)}, "head_set_sizes"),
    "group": ({"group_size": 0}, "group_size=0 is too small"),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_refuse_what_they_cannot_run(case):
    settings, text = PLANS[case]
    with pytest.raises(UsageError, match=text):
        SafetyPlan(**settings)


def test_the_folder_of_another_run_is_refused(tmp_path, requests):
    plan = run_cases.safety_plan(requests)
    started(tmp_path / "run", plan)
    with pytest.raises(RunError, match=r"differs in its plan \(n_random_sets was 2, now 5\)"):
        started(tmp_path / "run", replace(plan, n_random_sets=5))
    with pytest.raises(RunError, match="holds a run of"):
        started(tmp_path / "run", plan, planted.refusing(1, "llama").model)
    with pytest.raises(PromptError, match="cannot be read"):
        started(tmp_path / "other", run_cases.safety_plan(tmp_path / "none.csv"))
    assert not (tmp_path / "other").exists()


def test_the_report_shows_rates_and_the_head(whole, tmp_path):
    made, results = whole
    page = interp.make_report(results, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Refusals" in page
    assert str(Head(*made.head)) in page


def test_every_part_is_a_file_of_its_own(tmp_path, requests):
    run = started(tmp_path / "run", run_cases.safety_plan(requests, **SMALL))
    run.finish(progress=False)
    parts = ("replies.harmful", "replies.harmless", "gradient_importance", "ships.zero", "sahara.zero", "curve.zero")
    assert all(result_path(tmp_path / "run", name).is_file() for name in parts)
    assert [stage.name for stage in run.stages] == [*parts, "refusals"]
    assert safety.ABLATIONS == ("uniform", "zero")
