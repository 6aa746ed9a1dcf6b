"""Results that are read from a folder: names, reasons for missing ones, unfinished runs and runs inside of a run."""

import json
import shutil

import pytest
import run_cases
import tiny_chat_model
import torch
from run_cases import difference

from interp.analyses.results.files import seal
from interp.errors import RunError, ScoreError, UsageError
from interp.report import make_report
from interp.runs.results import cell_files, is_finished, read_results, record_path, result_path
from interp.runs.run import Run


@pytest.fixture(scope="module")
def finished(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    plan = run_cases.score_plan("basic", heads="")
    return folder, Run.open(folder, plan, model, tokenizer).finish(progress=False)


def test_a_run_holds_every_analysis_its_controls_and_views(finished):
    _, found = finished
    tables = ["retrieval", "induction", "previous_token", "duplicate_token", "sinks"]
    assert list(found.scores) == tables
    assert [len(table.per_prompt) for table in found.scores.values()] == [3] * 5
    assert [name for name in tables if found.control(name)] == tables[1:]
    assert found.control("nothing") is None
    assert "nothing" not in found
    assert found.get("nothing") is None
    assert found.get("sinks") is found["sinks"]
    assert list(found)[:5] == tables
    assert {"explore", "ov_tokens"} <= set(found)
    assert len(found) == len(found.results)
    assert len(found.texts["retrieval"]) == 3
    assert all(found.texts["retrieval"])
    assert found.settings["analyses"] == tables
    with pytest.raises(UsageError, match=r"no result 'speed'; it has 'retrieval', "):
        found["speed"]


def test_a_model_that_answers_nothing_has_no_retrieval_control(finished):
    _, found = finished
    assert found["retrieval"].counted == 0
    assert "retrieval.control" not in found
    assert "no prompt counted, as where the model answers none" in found.missing["retrieval.control"]
    assert "retrieval.control: not made, no head scores above 0" in found.summary()


def test_every_result_is_a_file_of_its_own(finished, model):
    folder, found = finished
    sinks = type(found["sinks"]).load(result_path(folder, "sinks"), model)
    assert torch.equal(sinks.per_prompt, found["sinks"].per_prompt)
    with pytest.raises(ScoreError, match="weights"):
        type(sinks).load(result_path(folder, "sinks"), tiny_chat_model.model(seed=1))


def test_an_unfinished_run_can_be_read(finished, tmp_path):
    folder, found = finished
    cut = shutil.copytree(folder, tmp_path / "cut")
    assert is_finished(cut)
    for name in ("sinks", "previous_token"):
        record_path(cut, name).unlink()
        sorted(cell_files(cut, name).glob("*.json"))[-1].unlink()
    record_path(cut, "induction.control").unlink()
    shutil.rmtree(cell_files(cut, "induction.control"))
    assert not is_finished(cut)
    partial = read_results(cut)
    assert len(partial["sinks"].per_prompt) == len(partial["previous_token"].per_prompt) == 2
    assert torch.equal(partial["sinks"].per_prompt, found["sinks"].per_prompt[:2])
    assert len(partial.texts["sinks"]) == 2
    assert "induction.control" not in partial
    assert "induction.control" not in partial.missing
    assert partial.unfinished == {"sinks": (1, 2), "previous_token": (1, 2), "induction.control": (0, 1)}
    first = partial.summary().splitlines()[0]
    assert first.startswith("This run is not finished: 2 of 5 cells of 3 stages are made.")
    assert "alone for previous_token (1 of 2 cells), sinks (1 of 2 cells)." in first
    assert "Nothing is made yet of induction.control." in first
    assert first in make_report(partial, tmp_path / "r.html").read_text(encoding="utf-8")
    assert not found.unfinished
    assert "not finished" not in found.summary()


def test_a_run_without_any_result_says_how_to_continue(model, tokenizer, tmp_path):
    Run.open(tmp_path / "run", run_cases.score_plan("sinks"), model, tokenizer)
    with pytest.raises(RunError, match=r"no finished result yet \(0 of 6 cells are made\); run the same command"):
        read_results(tmp_path / "run")


def test_an_optional_view_that_fails_is_missing_with_its_reason(tokenizer, tmp_path):
    model = tiny_chat_model.model()
    model.__class__ = type("Unknown", (type(model),), {})
    plan = run_cases.score_plan("sinks", check=False)
    found = Run.open(tmp_path / "run", plan, model, tokenizer).finish(progress=False)
    assert "ov_tokens" not in found
    assert "cannot bridge Unknown" in found.missing["ov_tokens"]
    assert "cannot bridge Unknown" in read_results(tmp_path / "run").missing["ov_tokens"]


def test_a_steering_run_inside_of_a_run_comes_along(finished, model, tokenizer, tmp_path):
    outer = shutil.copytree(finished[0], tmp_path / "run")
    plan = run_cases.steer_plan(run_cases.items_file(tmp_path / "mine.jsonl"), heads="L0H1")
    inner = outer / "steer-pasta"
    made = Run.open(inner, plan, model, tokenizer).finish(progress=False)
    found = read_results(outer)
    assert not difference(found["steer-pasta/steering"], made["steering"])
    assert list(found)[: len(finished[1])] == list(finished[1])
    page = make_report(found, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "pasta" in page.lower()
    # one that is not finished stays out
    cut = shutil.copytree(inner, outer / "steer-cut")
    record_path(cut, "steering").unlink()
    assert "steer-cut/steering" not in read_results(outer)
    assert read_results(outer).unfinished == {"steer-cut/steering": (1, 1)}
    shutil.rmtree(cut)
    manifest = json.loads((inner / "manifest.json").read_text())
    manifest["provenance"]["weights_hash"] = "another"
    (inner / "manifest.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(ScoreError, match="belong to"):
        read_results(outer)
