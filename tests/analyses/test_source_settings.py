"""Settings next to those of the source: declared names exist, and reports, lists and docs print both values."""

import inspect
import sys
from dataclasses import asdict, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import run_results
import tiny_chat_model
from html_page import Page

from interp.analyses import registry, tasks
from interp.analyses.prompt_sizes import PromptSizes, description, sizes_used
from interp.analyses.source_settings import OWN_PROMPTS, SettingRow, setting_rows, text
from interp.cli_list import card, card_data
from interp.report import render
from interp.report.run_words import run_settings
from interp.runs.plan import ScorePlan

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
method_pages = import_module("method_pages")

ENTRIES = [entry for entry in registry.entries() if entry.source_settings]
NAMES = [(entry.name, name) for entry in ENTRIES for name in entry.source_settings]
WITH_EXTRAS = [entry for entry in registry.entries() if entry.control_extras or entry.shown_extras]
OWN = {"qada": {"sink": 2, "window": 16, "refresh": 8, "min_keys": 8}}
MADE: dict[str, Any] = {
    "context_entropy": lambda sizes, tokenizer: tasks.contexts(tokenizer, questions=1, each=3, length=700),
}
"""what the standard prompts of a tokenizer of bytes would make too short or too long"""
SIZES = PromptSizes(n_needles=2, needle_length=700, n_texts=2, n_repeated=9, n_pairs=3, sweep_lengths=(700,))


@pytest.mark.parametrize(("analysis", "name"), NAMES)
def test_a_declared_name_is_a_setting_of_the_analysis_or_changes_its_prompts(analysis, name):
    entry = registry.get(analysis)
    if name in entry.settings:
        return
    tokenizer = tiny_chat_model.tokenizer()
    if "." in name:
        task, parameter = name.split(".")
        made = getattr(tasks, task)
        with mock.patch.object(tasks, task) as called:
            called.side_effect = lambda *given, **more: tasks.repeated(tokenizer, n=9, batch=1)
            entry.prompts(SIZES, tokenizer)
        # the standard prompts leave the default that the table states
        assert called.call_args_list
        assert all(parameter not in call.kwargs for call in called.call_args_list)
        assert inspect.signature(made).parameters[parameter].default is not inspect.Parameter.empty
        return
    assert name in {field.name for field in fields(PromptSizes)}
    value = getattr(SIZES, name)
    changed = replace(SIZES, **{name: value[:1] if isinstance(value, tuple) and len(value) > 1 else _more(value)})
    before, after = (_fingerprint(entry.prompts(sizes, tokenizer)) for sizes in (SIZES, changed))
    assert before != after


REFUSED = {*MADE, "duo_gates", "activation_patching", "path_patching", "attribution_patching", "logit_attribution"}
"""analyses whose standard prompts a tokenizer of bytes cannot make"""
DESCRIBED = [entry for entry in registry.entries() if entry.prompts is not None and entry.name not in REFUSED]


@pytest.mark.parametrize("entry", DESCRIBED, ids=lambda entry: entry.name)
def test_the_description_of_standard_prompts_names_the_sizes_that_change_them(entry):
    tokenizer = tiny_chat_model.tokenizer()
    used = sizes_used(entry.prompts)
    assert used is not None
    before = _fingerprint(entry.prompts(SIZES, tokenizer))
    for name in {field.name for field in fields(PromptSizes)} - {"seed", "haystack"}:
        value = getattr(SIZES, name)
        changed = replace(SIZES, **{name: value[-1:] if isinstance(value, tuple) and len(value) > 1 else _more(value)})
        if name in used:
            assert _fingerprint(entry.prompts(changed, tokenizer)) != before, name
        else:
            assert _fingerprint(entry.prompts(changed, tokenizer)) == before, name


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [("retrieval", {"needle_depths": (0.5,)},
      "16 texts of at most 320 tokens, each with a made-up fact (the needle) at one of the depths 0.5, and a question "
      "about it"),
     ("induction", {}, "12 sequences of 50 random tokens, each followed by its copy"),
     ("razor_echo", {"n_texts": 2}, "2 sequences of 50 random tokens, each followed by 3 copies"),
     ("positional", {}, "12 sequences of 2 × 50 random tokens"),
     ("sinks", {"text_length": 4096}, "12 plain texts of at most 4,096 tokens"),
     ("qk_score", {}, "16 multiple-choice questions")],
)  # fmt: skip
def test_prompts_of_a_run_in_words(name, sizes, words):
    assert description(registry.get(name).prompts, asdict(PromptSizes(**sizes))) == words
    plan = {"analyses": [name], "sizes": asdict(PromptSizes(**sizes))}
    page = Page(render(run_results.run({name: run_results.table(name, 0)}, settings=plan))).words
    assert f" Prompts {words}." in page or f" Prompts {words[:1].upper()}{words[1:]}." in page


def test_the_settings_of_a_run_are_those_that_it_used_in_words():
    plan = asdict(ScorePlan(analyses=("sinks",), settings={"sinks": {"rows": "visible"}}))
    rows = dict(run_settings(run_results.run({"sinks": run_results.table("sinks", 0)}, settings=plan)))
    assert (rows["analyses"], rows["ablation tests"], rows["sinks.rows"]) == ("sinks", "yes", "visible")
    assert (rows["number of plain texts"], rows["further ablations"]) == ("12", "mean, resample")
    assert not any("needle" in name or "optimisation" in name or "few-shot" in name for name in rows)
    # a prompt maker that does not name its sizes may use any of them
    own = run_results.run({"sinks": run_results.table("sinks", 0)}, settings=plan)
    with mock.patch.object(registry.get("sinks").prompts, "described", None):
        assert "number of needle prompts" in dict(run_settings(own))
    without = dict(run_settings(replace(own, settings=plan | {"check": False})))
    assert without["ablation tests"] == "no"
    assert "further ablations" not in without


def _more(value: Any) -> Any:
    return (900,) if isinstance(value, tuple) else value + 200 if value > 100 else value + 1


def _fingerprint(prompts: Any) -> list[str]:
    return [side.fingerprint() for side in (prompts if isinstance(prompts, tuple) else (prompts,))]


def test_rows_hold_the_values_of_a_run_and_of_the_source():
    rows = {row.name: row for row in setting_rows(registry.get("retrieval"), {"threshold": 0.2}, {"n_needles": 16})}
    assert rows["threshold"] == SettingRow(
        "threshold", "0.2", "0.1", "Score above which a head is called a retrieval head."
    )
    assert rows["threshold"].differs
    assert (rows["n_needles"].used, rows["n_needles"].source) == ("16", "600")
    assert (rows["by_value"].used, rows["by_value"].source) == ("false", "")
    assert rows["by_value"].help.startswith("Weight each key by the norm of its value vector")
    assert rows["n_needles"].help.startswith("Number of needle prompts")
    assert not rows["by_value"].differs
    assert not rows["form"].differs
    # without the sizes of the run there is nothing to state
    assert "needle_length" not in rows
    own = {row.name: row.used for row in setting_rows(registry.get("retrieval"), {}, {}, own=True)}
    assert own["n_needles"] == own["needle_length"] == OWN_PROMPTS
    shots = {row.name: row for row in setting_rows(registry.get("function_vectors"))}["relations.shots"]
    assert (shots.used, shots.source, shots.differs) == ("5", "10", True)


@pytest.mark.parametrize(
    ("used", "source", "differs"),
    [("16", "16", False), ("16", "16, unconfirmed", False), ("16", "160", True), ("1", "1,000 to 2,000", True),
     ("0.1", "0.15", True), ("steps", '"steps" in the code, "set" in the paper', False), ("16", "", False)],
)  # fmt: skip
def test_words_about_the_same_value_do_not_differ(used, source, differs):
    assert SettingRow("name", used, source).differs is differs


@pytest.mark.parametrize(
    ("value", "shown"),
    [(4.0, "4"), (0.1, "0.1"), (None, "none"), ("", "none"), (True, "true"), ((), "by default"), ((1, 2), "1, 2"),
     (text, "text"), ("\n", '"\\n"'), ({"a": 1}, '{"a": 1}')],
)  # fmt: skip
def test_values_as_text(value, shown):
    assert text(value) == shown


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_report_the_list_and_the_docs_print_both_values(entry):
    table = run_results.table(entry.name, 0, 0.2)
    plan = {"sizes": {field.name: getattr(PromptSizes(), field.name) for field in fields(PromptSizes)}}
    source = render(run_results.run({entry.name: table}, settings=plan))
    report, printed, page = Page(source).words, card(entry.name), method_pages.method_page(entry)
    given = {"threshold": 0.2} if "threshold" in entry.settings else {}
    rows = [row for row in setting_rows(entry, given) if row.source]
    assert len(rows) == len(entry.source_settings)
    for row in rows:
        assert f" {row.name} {row.used} {row.source} " in report
        assert any(line.split()[:1] == [row.name] and line.endswith(row.source) for line in printed.splitlines())
        assert f"| `{row.name}` |" in page
    data = card_data(entry.name)[0]["source_settings"]
    assert [row["name"] for row in data] == [row.name for row in setting_rows(entry) if row.source]
    assert source.count('<tr class="differs">') == sum(row.differs for row in rows)


@pytest.mark.parametrize("name", registry.names())
def test_every_section_of_a_method_prints_its_differences_and_settings(name):
    entry = registry.get(name)
    words = Page(render(run_results.run({name: run_results.table(name, 0)}))).words
    if differs := entry.sections.get("differs"):
        assert "Differences from the source" in words
        assert " ".join(differs.replace("`", "").split())[1:60] in words
    for row in setting_rows(entry):
        assert row.name not in entry.settings or not row.is_set or f" {row.name} {row.used} " in words
        assert row.help
    assert "$" not in words


@pytest.mark.parametrize("entry", WITH_EXTRAS, ids=lambda entry: entry.name)
def test_declared_extras_are_one_number_for_each_prompt_and_head(entry):
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    prompts = MADE.get(entry.name, entry.prompts)(SIZES, tokenizer)
    sides = prompts if entry.paired else (prompts,)
    scores = entry.thing(model, *sides, **OWN.get(entry.name, {}))
    for extra in (*entry.control_extras, *entry.shown_extras):
        assert scores.extras[extra].shape == scores.per_prompt.shape
