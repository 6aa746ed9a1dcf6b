"""Steering runs on a tiny model: resumed after a kill, what is not theirs refused; their command and report."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny_chat_model

from interp import steer, steerings
from interp.analyses import tasks
from interp.analyses.causal.ablation_test import CausalCheck, Condition, Outcome
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.steer.check import arms, kind_of, steer_check
from interp.errors import HeadError, RunError, ScoreError, UsageError
from interp.findings import Steered
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.report import make_report, render, words
from interp.steerings import SteerPlan, SteerRun, steering_findings

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "mine.jsonl"
    rows = [
        {
            "text": f"Number {i}: say yes or no. {HOSTILE if i == 3 else ''}",
            "spans": {"mark": "say yes or no"},
            "right": [" yes"],
            "wrong": [" no"],
            "question": f"number {i}? {HOSTILE}",
            "answer": "yes",
        }
        for i in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def model():
    return tiny_chat_model.model()


@pytest.fixture(scope="module")
def plan(items):
    return SteerPlan(
        "pasta", str(items), {"alpha": 0.1}, tops=(2, 4), profile_items=4, dev_items=3, test_items=4, keep=3, draws=2
    )


@pytest.fixture(scope="module")
def whole(model, plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, SteerRun.open(folder, plan, model, tiny_chat_model.tokenizer()).finish(progress=False)


def test_a_run_profiles_chooses_and_judges(whole, model, plan, items):
    folder, found = whole
    (told,) = found.steering
    assert (told.method, told.task) == ("pasta", "mine")
    assert {row["name"] for row in told.tried} <= {"as loaded", "top 2", "top 4", "all that gain", "all heads"}
    assert {"as loaded", "top 2", "top 4", "all heads"} <= {row["name"] for row in told.tried}
    sets = [row for row in told.tried if row["name"] != "as loaded"]
    assert told.chosen == max(sets, key=lambda row: (row["right"], row["score"]))["name"]
    assert told.check.kind == "Pasta(alpha=0.1)"
    edit = steer.Edits.load(folder / "edit.json")
    # the very replies that the Python call gives
    task = tasks.get(str(items))
    prompts = task.prompts(tiny_chat_model.tokenizer(), "test", 4)
    again = steer_check(
        model, prompts, edit, judge=task.judge, max_new_tokens=task.max_new_tokens, stop=task.stop, draws=2
    )
    assert told.check == again
    assert isinstance(told.profile, HeadScores)
    splits = [{p.meta["id"] for p in task.prompts(tiny_chat_model.tokenizer(), s, n)} for s, n in
              (("profile", 4), ("dev", 3), ("test", 4))]  # fmt: skip
    assert not splits[0] & splits[1] | splits[1] & splits[2] | splits[0] & splits[2]


def test_a_run_that_was_cut_goes_on(whole, model, plan, tmp_path, monkeypatch):
    _, found = whole
    calls, stopped = [], []
    for name in ("profile", "choose", "ask_steered"):
        real = getattr(steerings, name)

        def watched(*args, _real=real, _name=name, **kw):
            calls.append(_name)
            if (tmp_path / "cut" / "replies-00.json").exists() and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt
            return _real(*args, **kw)

        monkeypatch.setattr(steerings, name, watched)
    run = SteerRun.open(tmp_path / "cut", plan, model, tiny_chat_model.tokenizer())
    with pytest.raises(KeyboardInterrupt):
        run.finish(progress=False)
    # sets on the dev split come before the conditions on the test split
    assert calls[:2] == ["profile", "choose"]
    assert len(list((tmp_path / "cut").glob("replies-*.json"))) == 1
    with pytest.raises(RunError, match="not finished"):
        steering_findings(tmp_path / "cut")
    again = SteerRun.open(tmp_path / "cut", plan, model, tiny_chat_model.tokenizer()).finish(progress=False)
    assert calls.count("profile") == calls.count("choose") == 1
    assert again.steering[0].check == found.steering[0].check
    assert again.steering[0].tried == found.steering[0].tried


def test_a_folder_is_one_runs(whole, model, plan, tmp_path):
    folder, _ = whole
    tokenizer = tiny_chat_model.tokenizer()
    with pytest.raises(RunError, match="another plan"):
        SteerRun.open(folder, replace(plan, seed=1), model, tokenizer)
    with pytest.raises(RunError, match="holds a steering run of"):
        SteerRun.open(folder, plan, tiny_chat_model.model(seed=1), tokenizer)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="no steering run"):
        SteerRun.open(tmp_path, plan, model, tokenizer)
    with pytest.raises(RunError, match="no steering run"):
        steering_findings(tmp_path)


def test_heads_may_be_named_or_come_from_a_profile(whole, model, plan, tmp_path):
    folder, _ = whole
    tokenizer = tiny_chat_model.tokenizer()
    named = SteerRun.open(tmp_path / "a", replace(plan, heads="L0H1 L1H2"), model, tokenizer).finish(progress=False)
    (told,) = named.steering
    assert told.profile is None
    assert str(told.check.outcomes[1].condition.heads) == str(HeadSet.parse("L0H1 L1H2"))
    given = replace(plan, profile=str(folder / "profile.json"))
    (other,) = SteerRun.open(tmp_path / "b", given, model, tokenizer).finish(progress=False).steering
    assert other.tried == whole[1].steering[0].tried
    with pytest.raises(ScoreError):
        SteerRun.open(tmp_path / "c", given, tiny_chat_model.model(seed=1), tokenizer)
    with pytest.raises(HeadError, match="L9H0"):
        SteerRun.open(tmp_path / "d", replace(plan, heads="L9H0"), model, tokenizer)
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "d").exists()


def test_zerotuning_finds_its_gamma(model, plan, tmp_path):
    run = SteerRun.open(
        tmp_path / "run", replace(plan, method="zerotuning", settings={}), model, tiny_chat_model.tokenizer()
    )
    (told,) = run.finish(progress=False).steering
    gamma = json.loads((tmp_path / "run" / "gamma.json").read_text())
    best = max((row for row in gamma["tried"] if row["name"] != "as loaded"), key=lambda row: row["score"])
    assert gamma["gamma"] == float(best["name"])
    assert told.check.kind == f"ZeroTuning(gamma={gamma['gamma']})"


def test_what_changed_is_no_part_of_an_old_run(model, plan, items, tmp_path):
    """A file that is asked again under its old name."""
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\n".join(json.dumps(row | {"right": [" yes"], "wrong": [" no"]}) for row in rows))
    run = SteerRun.open(tmp_path / "run", replace(plan, task=str(mine)), model, tiny_chat_model.tokenizer())
    assert run.folder.exists()
    mine.write_text("\n".join(json.dumps(row | {"right": row["wrong"], "wrong": row["right"]}) for row in rows))
    with pytest.raises(RunError, match="another prompts"):
        SteerRun.open(tmp_path / "run", replace(plan, task=str(mine)), model, tiny_chat_model.tokenizer())


def test_nothing_is_begun_that_cannot_end(model, plan, tmp_path):
    for wrong, words_ in (
        (replace(plan, test_items=400), "n=400"),
        (replace(plan, dev_items=400), "n=400"),
        (replace(plan, method="temperature", settings={}), "changes nothing"),
        (replace(plan, settings={"alpha": 1}), "changes nothing"),
    ):
        with pytest.raises(UsageError, match=words_):
            SteerRun.open(tmp_path / "run", wrong, model, tiny_chat_model.tokenizer())
        assert not (tmp_path / "run").exists()


def test_a_check_without_all_of_its_conditions_is_not_finished(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    sorted(folder.glob("replies-*.json"))[-1].unlink()
    with pytest.raises(RunError, match="not finished"):
        steering_findings(folder)
    (folder / "steering.json").write_text("{}")
    with pytest.raises(RunError, match="no manifest"):
        steering_findings(folder)


def check_of(**verdicts: tuple[bool, ...]) -> CausalCheck:
    heads = HeadSet.parse("L0H1")
    rows = [
        Outcome(Condition(group, group.rstrip("123").replace("_", " "), heads), told, ("",) * len(told))
        for group, told in verdicts.items()
    ]
    return CausalCheck(tuple(rows), "Pasta(alpha=0.01)", 1)


def said(check: CausalCheck) -> str:
    return " ".join(words.steering_words(Steered("pasta", "json", check, "top 1")))


def test_conditions_are_compared_prompt_by_prompt():
    base = (True,) * 20 + (False,) * 20
    better = (True,) * 28 + (False,) * 12
    check = check_of(as_loaded=base, steered=better)
    assert check.gain("steered", "as loaded")[0] == pytest.approx(0.2)
    assert "Against as loaded: +20%" in said(check)
    assert "better" in said(check)
    assert "no control" in said(check)
    worse = said(check_of(as_loaded=(True,) * 36 + (False,) * 4, steered=(True,) * 4 + (False,) * 36))
    assert "worse" in worse
    assert "better" not in worse
    assert "not told apart" in said(check_of(as_loaded=base, steered=base[::-1]))
    assert "tell nothing" in said(check_of(as_loaded=(False,), steered=(True,)))
    drawn = check_of(as_loaded=base, steered=better, random1=base, random2=better)
    assert drawn.gain("steered", "random")[0] == pytest.approx(0.1)
    with pytest.raises(UsageError, match="not in this check"):
        check.gain("steered", "random")


def test_conditions():
    layout = HeadLayout(4, 4, 2)
    edit = steer.Boost("mark", 3.0, heads="L0H1 L2H3") + steer.ZeroTuning(2.0, heads="L1H1")
    rows = arms(edit, layout, draws=2, seed=3)
    groups = [row.condition.group for row in rows]
    assert groups == ["as loaded", "steered", *["random"] * 2, *["random by layer"] * 2]
    own = rows[1].condition.heads
    assert len(own) == 3
    assert all(not row.condition.heads & own for row in rows[2:])
    # each part in as many heads as it has of its own
    assert all([len(part.chosen(layout)) for part in row.edits] == [2, 1] for row in rows[1:])
    assert rows[1].edits == edit
    assert not rows[0].edits.edits
    # no head is left to draw from
    assert len(arms(steer.Boost("mark", 3.0), layout)) == 2
    assert arms(steer.Boost("mark", 3.0), layout)[1].edits.edits[0].heads == "all"
    # its vectors are those of its heads
    assert len(arms(steer.Offset({"L0H1": [1.0] * 4}), layout)) == 2
    assert str(arms(steer.Offset({"L0H1": [1.0] * 4}), layout)[1].condition.heads) == "L0H1"
    with pytest.raises(UsageError, match="draws=0"):
        arms(edit, layout, draws=0)
    assert kind_of(edit) == "Boost(factor=3.0) + ZeroTuning(gamma=2.0)"


def test_command_and_report(call, items, tmp_path):
    folder = str(tiny_chat_model.folder(tmp_path / "tiny"))
    small = ["--profile-items", 4, "--dev-items", 3, "--test-items", 4, "--draws", 1, "--tops", "2,4"]
    arguments = ["steer", folder, "--method", "pasta", "--task", items, "--set", "alpha=0.1", *small]
    code, out, err = call(*arguments, "-o", tmp_path / "run")
    assert code == 0, err
    assert "Pasta(alpha=0.1) on mine" in out
    assert "as loaded" in out
    code, out, _ = call(*arguments, "-o", tmp_path / "run", "--json")
    assert {"chosen", "tried", "check"} == set(json.loads(out)["steering"][0])
    assert call("report", tmp_path / "run", "-o", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert "Steering: pasta on mine" in page
    assert "<script>alert" not in page
    assert "number" in page


BAD = {
    "no such method": (["--method", "magic", "--task", "json"], "method 'magic' does not exist"),
    "no such task": (["--method", "pasta", "--task", "poetry"], "'poetry' is no task"),
    "no such file": (["--method", "pasta", "--task", "nothing.jsonl"], "nothing.jsonl"),
    "no such setting": (["--method", "act", "--task", "json", "--set", "gamma=2"], "act has no setting gamma"),
    "alpha below zero": (["--method", "pasta", "--task", "json", "--set", "alpha=-1"], "alpha=-1"),
    "alpha as a word": (["--method", "pasta", "--task", "json", "--set", "alpha=high"], "alpha="),
    "no value": (["--method", "pasta", "--task", "json", "--set", "alpha"], "write name=value"),
    "heads of another model": (["--method", "pasta", "--task", "json", "--heads", "L40H2"], "L40H2"),
    "sizes as words": (["--method", "pasta", "--task", "json", "--tops", "ten"], "whole numbers"),
    "no items": (["--method", "pasta", "--task", "json", "--test-items", "0"], "test_items=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(call, tmp_path, name):
    arguments, words = BAD[name]
    folder = str(tiny_chat_model.folder(tmp_path / "tiny"))
    code, out, err = call("steer", folder, *arguments, "-o", tmp_path / "run")
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not out
    assert not (tmp_path / "run").exists()


def test_a_steering_run_inside_of_a_run_comes_into_its_report(whole, tmp_path):
    from interp import results
    from interp.runs import Run
    from interp.studies import Plan

    plan = Plan(analyses=("sinks",), texts=2, text_length=40, check=False)
    Run.open(tmp_path / "run", plan, tiny_chat_model.model(), tiny_chat_model.tokenizer()).finish(progress=False)
    shutil.copytree(whole[0], tmp_path / "run" / "steer-pasta")
    found = results.findings(tmp_path / "run")
    assert found.steering[0].check == whole[1].steering[0].check
    assert "Steering: pasta on mine" in render(found)
    cut = shutil.copytree(whole[0], tmp_path / "run" / "steer-cut")
    (cut / "arms.json").unlink()
    assert len(results.findings(tmp_path / "run").steering) == 1
    manifest = json.loads((tmp_path / "run" / "steer-pasta" / "steering.json").read_text())
    manifest["origin"]["weights_hash"] = "another"
    (tmp_path / "run" / "steer-pasta" / "steering.json").write_text(json.dumps(manifest))
    with pytest.raises(ScoreError, match="belong to"):
        results.findings(tmp_path / "run")
    with pytest.raises(RunError):
        make_report(replace(found, scores={}, steering=(), explored=None), tmp_path / "r.html")
    with pytest.raises(UsageError):
        SteerPlan(tops=())
