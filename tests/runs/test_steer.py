"""Steering runs on a tiny model: heads and settings from one split, replies to another; what cannot end is refused."""

import json
from dataclasses import replace

import pytest
import run_cases
import tiny_chat_model
from run_cases import difference

from interp.analyses import tasks
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.steer.check import steer_check
from interp.analyses.steer.profile import Profile
from interp.errors import HeadError, RunError, ScoreError, UsageError
from interp.hooks.model.heads import HeadSet
from interp.report import make_report
from interp.runs.results import read_results, result_path
from interp.runs.run import Run
from interp.runs.steer import SteerPlan

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return run_cases.items_file(tmp_path_factory.mktemp("items") / "mine.jsonl", text=HOSTILE)


@pytest.fixture(scope="module")
def model():
    return tiny_chat_model.model()


@pytest.fixture(scope="module")
def plan(items):
    return run_cases.steer_plan(items)


def steered(folder, plan, model):
    return Run.open(folder, plan, model, tiny_chat_model.tokenizer()).finish(progress=False)


@pytest.fixture(scope="module")
def whole(model, plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, steered(folder, plan, model)


def test_a_run_profiles_chooses_and_tests(whole, model, plan, items):
    _, results = whole
    assert list(results) == ["steering"]
    found = results["steering"]
    assert (found.method, found.task) == ("pasta", "mine")
    names = {row.name for row in found.tried}
    assert {"baseline", "top 2", "top 4", "all heads"} <= names
    assert names <= {"baseline", "top 2", "top 4", "all heads", "all that gain"}
    assert found.chosen in names - {"baseline"}
    assert isinstance(found.profile, HeadScores)
    assert {"baseline", "steered"} <= set(found.trials.conditions)
    # the same replies as from the Python call
    task = tasks.get(str(items))
    prompts = task.prompts(tiny_chat_model.tokenizer(), "test", 4)
    again = steer_check(
        model, prompts, found.edits, judge=task.judge, max_new_tokens=task.max_new_tokens, stop=task.stop,
        n_random_sets=2,
    )  # fmt: skip
    assert not difference(again.trials, found.trials.trials)


def test_the_splits_do_not_overlap(items):
    task, tokenizer = tasks.get(str(items)), tiny_chat_model.tokenizer()
    sizes = (("profile", 4), ("dev", 3), ("test", 4))
    splits = [{prompt.meta["id"] for prompt in task.prompts(tokenizer, split, n)} for split, n in sizes]
    assert not splits[0] & splits[1]
    assert not splits[1] & splits[2]
    assert not splits[0] & splits[2]


def test_heads_may_be_named_or_come_from_a_profile(whole, model, plan, tmp_path):
    folder, results = whole
    named = steered(tmp_path / "named", replace(plan, heads="L0H1 L1H2"), model)["steering"]
    assert (named.profile, named.tried, named.chosen) == (None, (), "named")
    (trial,) = named.trials.select("steered")
    assert trial.heads == HeadSet.parse("L0H1 L1H2")
    given = replace(plan, profile=str(result_path(folder, "profile")))
    other = steered(tmp_path / "given", given, model)["steering"]
    assert not difference(other.tried, results["steering"].tried)
    with pytest.raises(ScoreError):
        steered(tmp_path / "other", given, tiny_chat_model.model(seed=1))
    with pytest.raises(UsageError, match="is a profile of Pasta, not of boost"):
        steered(tmp_path / "boost", replace(given, method="boost", settings={}), model)
    with pytest.raises(HeadError, match="L9H0"):
        steered(tmp_path / "bad", replace(plan, heads="L9H0"), model)
    assert not [name for name in ("other", "boost", "bad") if (tmp_path / name).exists()]
    assert isinstance(Profile.load(result_path(folder, "profile"), model), Profile)


def test_settings_that_are_left_open_are_chosen_on_the_dev_split(model, items, tmp_path):
    run = Run.open(
        tmp_path / "run", run_cases.steer_plan(items, "zerotuning"), model, tiny_chat_model.tokenizer()
    )  # fmt: skip
    assert [stage.name for stage in run.stages] == ["tuning", "profile", "choice", "steering"]
    found = run.finish(progress=False)["steering"]
    best = run.result("tuning").best
    assert f"gamma={found.edits.edits[0].gamma}" in best.replace(" ", "") or str(found.edits.edits[0].gamma) in best
    given = run_cases.steer_plan(items, "zerotuning", settings={"gamma": 2.0})
    stages = Run.open(tmp_path / "given", given, model, tiny_chat_model.tokenizer()).stages
    assert [stage.name for stage in stages] == ["profile", "choice", "steering"]


def test_edits_of_head_outputs_are_not_profiled(model, items, tmp_path):
    plan = run_cases.steer_plan(items, "gate", settings={"factor": 0.5})
    run = Run.open(tmp_path / "run", plan, model, tiny_chat_model.tokenizer())
    assert [stage.name for stage in run.stages] == ["steering"]
    assert run.finish(progress=False)["steering"].chosen == "all heads"


def test_items_that_changed_are_another_run(model, plan, items, tmp_path):
    """A file that is read again under its old name."""
    mine = tmp_path / "mine.jsonl"
    mine.write_text(items.read_text())
    Run.open(tmp_path / "run", replace(plan, task=str(mine)), model, tiny_chat_model.tokenizer())
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    mine.write_text("\n".join(json.dumps(row | {"right": row["wrong"], "wrong": row["right"]}) for row in rows))
    with pytest.raises(RunError, match="differs in its inputs"):
        Run.open(tmp_path / "run", replace(plan, task=str(mine)), model, tiny_chat_model.tokenizer())


def test_another_plan_or_model_is_refused(whole, model, plan):
    folder, _ = whole
    with pytest.raises(RunError, match=r"differs in its plan \(seed was 0, now 1\)"):
        steered(folder, replace(plan, seed=1), model)
    with pytest.raises(RunError, match="holds a run of"):
        steered(folder, plan, tiny_chat_model.model(seed=1))


WRONG = {
    "test items": ({"n_test_items": 400}, "n=400"),
    "dev items": ({"n_dev_items": 400}, "n=400"),
    "an edit that changes nothing": ({"method": "temperature", "settings": {}}, "changes nothing"),
    "a setting that changes nothing": ({"settings": {"alpha": 1}}, "changes nothing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_nothing_is_begun_that_cannot_end(model, plan, tmp_path, case):
    changed, text = WRONG[case]
    with pytest.raises(UsageError, match=text):
        steered(tmp_path / "run", replace(plan, **changed), model)
    assert not (tmp_path / "run").exists()


PLANS = {
    "method": ({"method": "magic"}, "unknown edit 'magic'"),
    "nearly a method": ({"method": "past"}, "did you mean 'pasta'"),
    "setting": ({"settings": {"alhpa": 0.1}}, "did you mean 'alpha'"),
    "type": ({"settings": {"alpha": "high"}}, "expected float"),
    "sizes": ({"head_set_sizes": ()}, "head_set_sizes"),
    "size": ({"head_set_sizes": (0,)}, "head_set_sizes"),
    "items": ({"n_test_items": 0}, "n_test_items=0 is too small"),
    "sets": ({"n_random_sets": 0}, "n_random_sets=0 is too small"),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_refuse_what_they_cannot_run(case):
    changed, text = PLANS[case]
    with pytest.raises(UsageError, match=text):
        SteerPlan(**{"method": "pasta", "task": "json"} | changed)


def test_names_of_edits_are_canonical():
    assert SteerPlan(method="Found-In-The-Middle", task="json").method == "found_in_the_middle"


def test_the_report_escapes_items(whole, tmp_path):
    page = make_report(read_results(whole[0]), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "number 3?" in page or "Number 3" in page or "pasta" in page.lower()
    assert "<script>alert" not in page


def test_named_heads_need_no_items_to_profile(model, items, tmp_path):
    """More profile items than the task has are no obstacle where nothing is profiled."""
    plan = run_cases.steer_plan(items, heads="L0H1", n_profile_items=10_000)
    assert steered(tmp_path / "run", plan, model)["steering"].chosen == "named"
    with pytest.raises(UsageError, match="n=10000 is out of range"):
        Run.open(tmp_path / "other", replace(plan, heads=""), model, tiny_chat_model.tokenizer())
