"""Another package joins by entry points: listed, run, reported and checked, with no file of this project changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import plugin_package
import pytest
import tiny_chat_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 40


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of a process that has the package installed."""
    site = plugin_package.install(tmp_path_factory.mktemp("site") / "packages")
    path = os.pathsep.join([str(site), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_chat_model.folder(tmp_path_factory.mktemp("model") / "tiny"))


def interp(environment, *arguments) -> str:
    """What the command prints."""
    command = [sys.executable, "-c", "from interp.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", plugin_package.MODULES)
def test_each_is_short(name):
    assert plugin_package.MODULES[name].count("\n") <= MAX_LINES + 2


def test_all_three_are_listed(environment):
    rows = {row["name"]: row for row in json.loads(interp(environment, "list", "--json"))}
    assert [rows[name]["kind"] for name in ("second_copy", "opening", "everyother")] == ["analysis", "edit", "selector"]
    assert rows["second_copy"]["package"] == rows["opening"]["package"] == "plug"
    assert rows["retrieval"]["package"] == "interp"
    card = interp(environment, "list", "second-copy")
    assert "A test of plug-ins." in card
    assert "scale = 1.0  Number that scores are multiplied by." in card


def test_the_analysis_runs_with_its_control_and_stands_in_the_report(environment, model, tmp_path):
    few = [
        "--n-texts",
        2,
        "--n-heads",
        2,
        "--n-random-sets",
        1,
        "--explorer-tokens",
        0,
        "--set",
        "second-copy.scale=0.5",
    ]
    out = interp(environment, "score", "second-copy", model, "--out", tmp_path / "run", *few)
    assert "second_copy: share of attention, 2 prompts counted" in out
    assert "second_copy.control" in out
    assert "random by layer" in out
    interp(environment, "report", tmp_path / "run", "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Second copy" in page
    assert "Does not show that the head copies anything." in page
    assert "random" in page


def test_the_edit_steers_a_task(environment, model, tmp_path):
    items = [
        {"text": f"Number {i}: say yes or no.", "spans": {"mark": "say yes"}, "right": [" yes"], "wrong": [" no"]}
        for i in range(30)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, items)))
    few = ["--n-dev-items", 2, "--n-test-items", 3, "--n-random-sets", 1, "--heads", "L0H1", "--set", "factor=3.0"]
    out = interp(
        environment, "steer", model, "--method", "opening", "--task", path, "--out", tmp_path / "run", *few
    )  # fmt: skip
    assert "Opening(" in out
    assert "random" in out
    interp(environment, "report", tmp_path / "run", "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Opening" in page


def test_the_selector_is_compared_with_random_keys(environment, model, tmp_path):
    few = [
        "--n-texts",
        2,
        "--needle-length",
        700,
        "--set",
        'kv.selectors=["everyother"]',
        "--set",
        "everyother.stride=3",
    ]
    out = interp(environment, "score", "kv", model, "--out", tmp_path / "run", *few)
    assert "everyother" in out.lower()
    assert "random" in out
    interp(environment, "report", tmp_path / "run", "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Every other key" in page


def test_all_three_pass_the_public_contracts(environment):
    program = """
from interp import testing
from plug.every_other import EveryOther
from plug.opening import Opening
from plug.second_copy import second_copy
testing.check_edit(Opening(factor=3.0), noop=Opening(factor=1.0))
testing.check_selector(EveryOther)
testing.check_invariances(second_copy, "induction")
print("passed")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "passed", done.stderr
