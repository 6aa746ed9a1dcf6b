"""A chat template that writes the date: a run keeps the date on which it began, and says it."""

import json
from dataclasses import replace

import pytest
import run_cases
import tiny_chat_model

import interp
from interp.errors import RunError
from interp.hooks.model.chat_template import fixed_date, with_date
from interp.report import render
from interp.runs import date as dates
from interp.runs.folder import read_manifest
from interp.runs.results import read_results
from interp.runs.run import Run

PLAN = run_cases.score_plan("sinks", check=False, heads="")
MESSAGES = [[{"role": "user", "content": "What day is it today, and what was yesterday?"}]]
HEAD = "{{ '<s>Today: ' + strftime_now('%d %b %Y') + '</s>' }}"


@pytest.fixture(scope="module")
def dated():
    made = tiny_chat_model.tokenizer()
    made.chat_template = HEAD + made.chat_template
    return made


def on(monkeypatch, day):
    monkeypatch.setattr(dates, "_today", lambda: day)


def begin(folder, model, tokenizer, plan=PLAN):
    """Open a run on the user's own chats, as the command does."""
    tokenizer = dates.dated(folder, tokenizer)
    return Run.open(folder, plan, model, tokenizer, interp.Prompts.encode(tokenizer, MESSAGES))


def test_a_run_is_continued_on_another_day(model, dated, tmp_path, monkeypatch):
    on(monkeypatch, "2026-01-31")
    begin(tmp_path / "run", model, dated)
    on(monkeypatch, "2026-02-01")
    again = begin(tmp_path / "run", model, dated)
    assert fixed_date(again.tokenizer) == "2026-01-31"
    assert "Today: 31 Jan 2026" in again.stages[0].prompts[0][0][0].text
    found = again.finish(progress=False)
    assert read_manifest(tmp_path / "run")["date"] == "2026-01-31"
    assert "chats hold the fixed date 2026-01-31" in found.provenance.note
    assert "chats hold the fixed date 2026-01-31" in render(found)
    on(monkeypatch, "2027-06-05")
    assert list(read_results(tmp_path / "run")) == list(found)


def test_the_prompts_of_a_run_have_its_date(model, dated, tmp_path, monkeypatch):
    plan = run_cases.score_plan("retrieval", check=False, heads="")
    on(monkeypatch, "2026-01-31")
    first = Run.open(tmp_path / "a", plan, model, dated)
    on(monkeypatch, "2026-02-01")
    assert Run.open(tmp_path / "a", plan, model, dated)._manifest()["prompts"] == first._manifest()["prompts"]
    other = Run.open(tmp_path / "b", plan, model, dated)
    assert other._manifest()["date"] == "2026-02-01"


def test_a_tokenizer_with_another_date_is_another_run(model, dated, tmp_path):
    begin(tmp_path / "run", model, with_date(dated, "2026-01-31"))
    begin(tmp_path / "run", model, with_date(dated, "2026-01-31"))
    with pytest.raises(RunError, match=r"differs in its date \('2026-01-31', now '2026-02-01'\)"):
        begin(tmp_path / "run", model, with_date(dated, "2026-02-01"))


def test_a_template_without_a_date_has_none(model, tokenizer, tmp_path):
    assert dates.dated(tmp_path, tokenizer) is tokenizer
    run = Run.open(tmp_path / "run", PLAN, model, tokenizer)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["date"] == ""
    assert "date" not in run.provenance.note


def test_settings_still_tell_runs_apart(model, dated, tmp_path):
    begin(tmp_path / "run", model, dated)
    with pytest.raises(RunError, match="differs in its plan"):
        begin(tmp_path / "run", model, dated, replace(PLAN, batch_size=5))
