"""The command line: exit codes, output, JSON that parses, and quick help."""

import json
import re
import subprocess
import sys

import pytest

import interp
from interp.analyses import registry
from interp.cli_list import citation
from interp.runs.plan import ScorePlan
from interp.runs.run import Run

COMMANDS = ("list", "doctor", "score", "steer", "safety", "report", "show")


def test_version_and_help(call):
    assert call("--version")[:2] == (0, f"interp {interp.__version__}\n")
    code, out, _ = call("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_no_torch_and_explains_every_option(command):
    """In a process of its own, since the tests have imported torch."""
    code = f"""
import sys
import typer
from interp.cli import app, main
command = typer.main.get_command(app)
for each in [{command!r}] if {command!r} else []:
    for parameter in command.commands[each].params:
        assert getattr(parameter, "help", None), parameter.name
sys.argv = ["interp", *[name for name in [{command!r}] if name], "--help"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_score_show_and_report(call, finished, tmp_path):
    code, out, _ = call("show", finished, "--json", "--top", 3)
    shown = json.loads(out)
    assert code == 0
    assert {"retrieval", "sinks"} <= set(shown["results"])
    assert len(shown["results"]["sinks"]["top"]) == 3
    assert set(shown) == {"results", "missing", "unfinished"}
    code, out, _ = call("show", finished)
    assert code == 0
    assert "sinks: share of attention, 2 prompts counted" in out
    code, out, _ = call("report", finished, "-o", tmp_path / "r.html")
    assert code == 0
    assert out.strip() == str(tmp_path / "r.html")
    assert "sinks" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_show_takes_the_file_of_a_result_and_checks_its_model(call, finished, folder):
    for path in sorted((finished / "results").glob("*.json")):
        code, out, err = call("show", path)
        assert code == 0, err
        assert out.strip()
        code, out, err = call("show", path, "--json", "--top", 2)
        assert code == 0, err
        json.loads(out)
    assert call("show", finished, "--model", folder)[0] == 0
    assert call("show", finished / "results" / "sinks.json", "--model", folder)[0] == 0


def test_scoring_again_changes_nothing(call, folder, finished, small):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.json")}
    assert call("score", "retrieval,sinks", folder, "--out", finished, *small)[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.json")}


def test_dry_run_prints_the_cost_and_writes_nothing(call, folder, tmp_path, small):
    code, out, _ = call("score", "basic", folder, "--out", tmp_path / "run", "--dry-run", *small)
    assert code == 0
    assert "induction.control" in out
    assert "total" in out
    assert not (tmp_path / "run").exists()
    code, out, _ = call("score", "sinks", folder, "--out", tmp_path / "run", "--dry-run", "--json", *small)
    assert json.loads(out)["stages"][0]["n_prompts"] == 2


def test_importance_and_its_report(call, folder, tmp_path):
    run = tmp_path / "run"
    options = ["--n-texts", 3, "--text-length", 40, "--heads", "L0H1, L1H2", "--no-check", "--explorer-tokens", 0]
    code, _, err = call("score", "gradient_importance", folder, "--out", run, *options)
    assert code == 0, err
    assert "gradient_importance" in json.loads(call("show", run, "--json")[1])["results"]
    assert call("report", run, "-o", tmp_path / "r.html")[0] == 0


def test_settings_reach_the_analysis(call, folder, tmp_path, small):
    options = [*small, "--no-check", "--explorer-tokens", 0]
    code, _, err = call(
        "score", "sinks", folder, "--out", tmp_path / "run", *options, "--set", "sinks.column_threshold=0.25"
    )
    assert code == 0, err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["plan"]["settings"] == {"sinks": {"column_threshold": 0.25}}
    stored = interp.HeadScores.load(tmp_path / "run" / "results" / "sinks.json")
    assert stored.settings["column_threshold"] == 0.25


def test_doctor(call, folder):
    code, out, _ = call("doctor", folder)
    assert code == 0, out
    code, out, _ = call("doctor", folder, "--json")
    assert json.loads(out)["checks"]


def test_list_has_every_entry(call):
    code, out, _ = call("list")
    assert code == 0
    names = [name for kind in registry.KINDS for name in registry.names(kind)]
    assert all(name in out for name in names)
    listed = json.loads(call("list", "--json")[1])
    rows = [row for row in listed if row["kind"] in registry.KINDS]
    assert sorted(row["name"] for row in rows) == sorted(names)
    assert all(row["source"] for row in rows if row["group"] != "views")
    assert [row["name"] for row in listed if row["kind"] == "task"] == list(interp.tasks.names())
    # the need of any heads is in words, since no analysis has this name
    assert "needs heads from any other analysis" in out
    assert "needs scores of retrieval_reasoning or retrieval" in out
    assert {row["name"] for row in rows if row["command"] == "safety"} == {"ships", "sahara"}
    assert sum(line.endswith("part of interp safety") for line in out.splitlines()) == 2


def test_list_and_help_tell_the_sets_apart(call):
    basic = "retrieval, induction, previous_token, duplicate_token, sinks"
    lines = call("list")[1].split("Sets of analyses")[1].splitlines()[1:4]
    words = [line.split(maxsplit=1) for line in lines]
    assert [name for name, _ in words] == ["basic", "long", "all"]
    assert words[0][1] == f"the five analyses of `interp report`: {basic}"
    assert words[2][1].startswith(
        "every analysis that needs no results of another, without needle_sweep and those of `interp safety`: "
    )
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", call("score", "--help")[1]).split())
    assert all(f"{name} (" in text for name, _ in words)
    assert ScorePlan().analyses == tuple(basic.split(", "))


def test_list_has_every_task(call):
    """Their names are those of `interp steer --task`."""
    descriptions = {name: interp.tasks.get(name).description for name in interp.tasks.names()}
    for arguments in (["list"], ["list", "tasks"]):
        code, out, _ = call(*arguments)
        assert code == 0
        found = [line.split(maxsplit=1) for line in out.split("Tasks (")[1].splitlines()[1 : 1 + len(descriptions)]]
        assert dict(found) == descriptions
    assert [row["name"] for row in json.loads(call("list", "tasks", "--json")[1])] == list(descriptions)
    for name, description in descriptions.items():
        code, out, _ = call("list", name)
        assert code == 0
        assert "interp steer MODEL --task NAME" in out
        assert out.splitlines()[-1].split(maxsplit=1) == [name, description]
    assert not [name for name in descriptions if registry.kinds_of(name)], "a task and an entry share a name"


@pytest.mark.parametrize(
    ("name", "first", "line"),
    [
        (
            "snapkv",
            "snapkv: SnapKV (selector)",
            "keep_ratio (in a run: --set kv.keep_ratios)  Share of the prompt's keys",
        ),
        ("pasta", "pasta: PASTA (edit, spans)", "heads (in a run: --heads)  Heads to edit."),
        (
            "retrieval",
            "retrieval: Retrieval (analysis, long context)",
            "max_new_tokens = 32 (in a run: --reply-",
        ),
    ],
)
def test_cards_name_the_group_and_the_fields_that_a_run_sets(call, name, first, line):
    code, out, _ = call("list", name)
    assert code == 0
    assert out.splitlines()[0] == first
    assert line in out


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("Wu et al. 2404.15574, section 2. The authors use 50 new tokens.", "Wu et al. 2404.15574, section 2"),
        ("Gu et al. 2410.10781: the score and its\nthreshold.", "Gu et al. 2410.10781"),
        (
            "QRHead, Zhang et al. 2506.09944, by the released code, which keeps 16 heads.",
            "QRHead, Zhang et al. 2506.09944, by the released code",
        ),
        ("", ""),
    ],
)
def test_list_gives_the_citation_of_a_source_whole(source, shown):
    assert citation(source) == shown


def test_list_prints_the_memory_of_gradients(call):
    sentence = r"Memory\n    1\d\.\d GB of activations for one prompt of 32,768 tokens"
    assert re.search(sentence, call("list", "gradient_importance")[1])
    (card,) = json.loads(call("list", "duo_gates", "--json")[1])
    assert card["memory"].startswith("25.2 GB of activations")
    assert "Memory" not in call("list", "induction")[1]
    (card,) = json.loads(call("list", "duo_gates", "--json")[1])
    assert card["memory"].startswith("25.2 GB of activations")
    assert "Memory" not in call("list", "induction")[1]


@pytest.mark.parametrize("name", sorted({name for kind in registry.KINDS for name in registry.names(kind)}))
def test_list_prints_the_card_of_every_entry(call, name):
    code, out, err = call("list", name)
    assert code == 0, err
    assert out.count(f"{name}: ") >= len(registry.kinds_of(name))
    cards = json.loads(call("list", name, "--json")[1])
    assert [card["kind"] for card in cards] == registry.kinds_of(name)
    for card in cards:
        assert card["summary"]
        for setting in card["settings"]:
            assert setting["name"] in out
            assert setting["help"], f"{name}.{setting['name']} has no help"


def test_ctrl_c_is_130_and_says_how_to_continue(call, folder, tmp_path, monkeypatch, small):
    def stopped(self, stage, cell):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_cell", stopped)
    code, _, err = call("score", "sinks", folder, "--out", tmp_path / "run", *small)
    assert code == 130
    assert "run the same command again to continue" in err


def test_an_unforeseen_error_is_one_sentence(call, folder, tmp_path, monkeypatch, small):
    def broken(self, stage, cell):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Run, "_cell", broken)
    code, _, err = call("score", "sinks", folder, "--out", tmp_path / "run", *small)
    assert code == 1
    assert "ZeroDivisionError: by zero" in err
    assert "Traceback" not in err
