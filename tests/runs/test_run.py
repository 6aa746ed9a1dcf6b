"""Run folders: what they hold, and what is refused before anything is computed."""

import json
from dataclasses import replace
from typing import Any

import pytest
import run_cases
import tiny_chat_model
import torch

import interp
from interp.analyses import tasks
from interp.analyses.results.files import seal
from interp.analyses.tasks import standard
from interp.analyses.tasks.standard import PromptSizes
from interp.errors import HeadError, PromptError, RunError, UsageError
from interp.runs import folder as folders
from interp.runs.plan import ScorePlan
from interp.runs.results import read_results
from interp.runs.run import Run
from interp.testing import families

PLAN = run_cases.score_plan("previous_token", "sinks", check=False, heads="")


@pytest.fixture(scope="module")
def finished(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, Run.open(folder, PLAN, model, tokenizer).finish(progress=False)


def test_another_model_plan_or_folder_is_refused(finished, model, tokenizer, tmp_path):
    folder, _ = finished
    with pytest.raises(RunError, match=r"holds a run of .* \(weights [0-9a-f]+\), not of .* \(weights [0-9a-f]+\)"):
        Run.open(folder, PLAN, tiny_chat_model.model(seed=1), tokenizer)
    with pytest.raises(RunError, match=r"holds a run that differs in its sizes \(seed was 0, now 1\)"):
        Run.open(folder, replace(PLAN, sizes=replace(PLAN.sizes, seed=1)), model, tokenizer)
    with pytest.raises(RunError, match=r"differs in its plan \(batch_size was 2, now 3\)"):
        Run.open(folder, replace(PLAN, batch_size=3), model, tokenizer)
    steered = run_cases.steer_plan(run_cases.items_file(tmp_path / "mine.jsonl"), heads="L0H1")
    with pytest.raises(RunError, match="differs in its recipe"):
        Run.open(folder, steered, model, tokenizer)


def test_a_folder_with_something_else_is_refused(model, tokenizer, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RunError, match="exists and is not a run folder"):
        Run.open(tmp_path, PLAN, model, tokenizer)
    with pytest.raises(RunError, match="is not a run folder"):
        read_results(tmp_path)
    with pytest.raises(RunError, match="name a"):
        Run.open(tmp_path / "mine.txt" / "run", PLAN, model, tokenizer)


def test_what_a_killed_start_left_is_no_obstacle(model, tokenizer, tmp_path):
    (tmp_path / ".manifest.json.123.tmp").write_text("{")
    assert Run.open(tmp_path, PLAN, model, tokenizer).folder == tmp_path


@pytest.mark.parametrize(
    ("content", "text"),
    [('{"format": "other/9"}', "format 'other/9', this version reads"), ("[1]", "holds a list"), ("{", "as JSON")],
)
def test_a_manifest_of_another_format_is_refused(model, tokenizer, tmp_path, content, text):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RunError, match=text):
        read_results(tmp_path)
    with pytest.raises(RunError, match=text):
        Run.open(tmp_path, PLAN, model, tokenizer)


def test_another_version_is_refused(model, tokenizer, tmp_path, monkeypatch):
    Run.open(tmp_path / "run", PLAN, model, tokenizer)
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(seal(manifest | {"interp": "0.0.1"})))
    with pytest.raises(RunError, match=r"differs in its version of interp \('0.0.1', now"):
        Run.open(tmp_path / "run", PLAN, model, tokenizer)
    manifest["provenance"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(seal(manifest)))
    with pytest.raises(RunError, match="other package versions"):
        Run.open(tmp_path / "run", PLAN, model, tokenizer)


def test_prompts_that_changed_are_another_run(model, tokenizer, tmp_path):
    """A file of prompts that is read again under its old name."""
    one, other = (interp.Prompts.encode(tokenizer, [{"text": text * 9}]) for text in ("a cat sat. ", "a dog sat. "))
    Run.open(tmp_path / "run", PLAN, model, tokenizer, one)
    with pytest.raises(RunError, match="differs in its prompts"):
        Run.open(tmp_path / "run", PLAN, model, tokenizer, other)


def test_prompts_too_long_are_refused_before_anything_is_computed(model, tokenizer, tmp_path):
    long = replace(PLAN, sizes=replace(PLAN.sizes, text_length=3000))
    with pytest.raises(PromptError, match="context of this model is 2,048"):
        Run.open(tmp_path / "run", long, model, tokenizer)
    keys = run_cases.score_plan("kv", sizes=replace(run_cases.SIZES, needle_length=3000), heads="")
    with pytest.raises(PromptError, match="context of this model is 2,048"):
        Run.open(tmp_path / "run", keys, model, tokenizer)
    assert not (tmp_path / "run").exists()


def test_key_selectors_refuse_own_prompts_and_models_with_windows_alone(model, tokenizer, tmp_path):
    own = standard.check_needles(run_cases.SIZES, tokenizer)
    with pytest.raises(UsageError, match="kv takes prompts that are made for it"):
        Run.open(tmp_path / "run", run_cases.score_plan("sinks", "kv", check=False), model, tokenizer, own)
    with pytest.raises(UsageError, match="every layer of this model has a sliding window"):
        Run.open(tmp_path / "run", run_cases.score_plan("kv", heads=""), families.make("mistral"), tokenizer)
    assert not (tmp_path / "run").exists()


def test_named_heads_are_checked_and_ablated(model, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(HeadError, match="layer 7 of a 2-layer model"):
        Run.open(tmp_path / "bad", run_cases.score_plan("sinks", heads="L7H0"), model, tokenizer)
    assert not (tmp_path / "bad").exists()
    plan = run_cases.score_plan("sinks", heads="L1H0, L1H2")
    # this model answers nothing, so there is nothing that heads could do
    nothing = Run.open(tmp_path / "nothing", plan, model, tokenizer).finish(progress=False)["heads.control"]
    assert nothing.conditions == ("baseline",)
    assert nothing.settings["counted"] == {"accuracy": [0, 6]}
    made = standard.check_needles

    def always_right(sizes, tokenizer):
        prompts = made(sizes, tokenizer)
        return replace(prompts, items=tuple(replace(each, meta={**each.meta, "answer": "the"}) for each in prompts))

    monkeypatch.setattr(standard, "check_needles", always_right)
    found = Run.open(tmp_path / "run", plan, model, tokenizer).finish(progress=False)
    (top,) = found["heads.control"].select("top")
    assert [str(head) for head in top.heads] == ["L1H0", "L1H2"]
    others = [trial for name in ("random", "random by layer") for trial in found["heads.control"].select(name)]
    assert len(others) == 4
    assert all(len(trial.heads) == 2 and not trial.heads & top.heads for trial in others)


def test_a_run_of_own_prompts_says_so(model, tokenizer, tmp_path, finished):
    own = tasks.repeated(tokenizer, n=12, batch=3)
    Run.open(tmp_path / "run", PLAN, model, tokenizer, own).finish(progress=False)
    assert read_results(tmp_path / "run").own_prompts
    assert not finished[1].own_prompts


def test_too_many_ablated_heads_leave_no_control(model, tokenizer, tmp_path):
    with pytest.raises(UsageError, match="5 ablated heads of 8 leave too few for a random control"):
        Run.open(tmp_path / "run", run_cases.score_plan("retrieval", heads="", n_heads=5), model, tokenizer)


def test_the_explorer_is_no_longer_than_the_context(tokenizer, tmp_path):
    plan = run_cases.score_plan("sinks", sizes=replace(run_cases.SIZES, explorer_tokens=10**6), check=False, heads="")
    run = Run.open(tmp_path / "run", plan, tiny_chat_model.model(), tokenizer)
    (stage,) = (stage for stage in run.stages if stage.name == "explore")
    assert max(stage.prompts[0][0].lengths) <= 2048


def test_a_run_gives_its_results_by_name(finished, model, tokenizer):
    folder, found = finished
    run = Run.open(folder, PLAN, model, tokenizer)
    assert list(run.scores) == ["previous_token", "sinks"]
    assert run["sinks"].name == "sinks"
    with pytest.raises(UsageError, match=r"no result 'speed'; it has 'previous_token', 'sinks'"):
        run["speed"]
    assert run.result("speed") is None
    assert folders.read_manifest(folder)["plan"]["sizes"]["seed"] == 0
    assert found.seconds > 0


PLANS = {
    "no such analysis": (lambda: ScorePlan(analyses=("speed",)), "unknown analysis 'speed'.*; choose from basic, "),
    "nearly one": (lambda: ScorePlan(analyses=("sink",)), "did you mean 'sinks'"),
    "none": (lambda: ScorePlan(analyses=()), "no analysis is named"),
    "part of another command": (lambda: ScorePlan(analyses=("ships",)), "part of the run `interp safety`"),
    "views of no heads": (lambda: ScorePlan(analyses=("qk_projection", "kv")), "add an analysis that finds heads"),
    "influence of nothing": (lambda: ScorePlan(analyses=("attention_influence",)), "add retrieval"),
    "random sets": (lambda: ScorePlan(n_random_sets=0), "n_random_sets=0 is too small"),
    "heads": (lambda: ScorePlan(n_heads=0), "n_heads=0 is too small"),
    "batch": (lambda: ScorePlan(batch_size=0), "batch_size=0 is too small"),
    "ablation": (
        lambda: ScorePlan(**dict[str, Any](ablation="none")),
        "unknown ablation 'none'; choose from zero, uniform, first",
    ),
    "settings of nothing": (lambda: ScorePlan(settings={"quada": {"tau": 1.0}}), "did you mean 'qada'"),
    "no such setting": (lambda: ScorePlan(settings={"qada": {"tua": 0.9}}), "did you mean 'tau'"),
    "setting of another type": (lambda: ScorePlan(settings={"qada": {"tau": "high"}}), "expected "),
    "texts": (lambda: PromptSizes(n_texts=0), "n_texts=0 is too small"),
    "steps": (lambda: PromptSizes(training_steps=0), "training_steps=0 is too small"),
    "explorer": (lambda: PromptSizes(explorer_tokens=-1), "explorer_tokens=-1 is negative"),
    "depths": (lambda: PromptSizes(needle_depths=(2.0,)), "between 0 and 1"),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_refuse_what_they_cannot_run(case):
    make, text = PLANS[case]
    with pytest.raises(UsageError, match=text):
        make()


def test_plans_take_names_and_sets_in_any_order():
    def named(*given):
        return ScorePlan(analyses=given).analyses

    assert named("sinks", "previous-token") == ("previous_token", "sinks")
    assert named("basic") == ("retrieval", "induction", "previous_token", "duplicate_token", "sinks")
    assert named("long", "sinks")[:2] == ("retrieval", "sinks")
    assert {"qrhead", "duo_gates", "task_kv"} < set(named("long")) < set(named("all"))
    assert named("kv", "sinks") == ("sinks", "kv")
    assert "kv" in named("all")
    assert "kv" not in named("basic", "long")
    wanted = ("retrieval", "gradient_importance", "activation_patching")
    assert named("activation_patching", "Gradient-Importance", "retrieval") == wanted


def test_partners_follow_their_prompts_into_every_batch(model, tokenizer, tmp_path):
    """The second side of a pair stays with the first, however the prompts are divided."""
    found = []
    for size in (1, 8):
        settings: dict[str, Any] = {"settings": {"concept_induction": {"right_only": False}}, "batch_size": size}
        plan = run_cases.score_plan("concept_induction", check=False, heads="", **settings)
        found.append(Run.open(tmp_path / str(size), plan, model, tokenizer).finish(progress=False).scores)
    one, whole = (scores["concept_induction"].extras["control"] for scores in found)
    assert len(one) > 2
    torch.testing.assert_close(one, whole, atol=1e-5, rtol=0, equal_nan=True)
    assert len({tuple(row.flatten().tolist()) for row in whole.nan_to_num(0.0)}) == len(whole)
