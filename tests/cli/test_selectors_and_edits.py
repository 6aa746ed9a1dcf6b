"""Every edit and every key selector by its name on the command line, on a tiny model."""

import json

import pytest
import run_cases

from interp.analyses import registry
from interp.analyses.kv.selectors_of import condition_of
from interp.runs.results import read_results

# settings without which an edit changes nothing, by edit
SETTINGS = {
    "keyscale": ("factor=0.5",), "temperature": ("temperature=0.5",), "gate": ("factor=0.5",),
    "zerotuning": ("gamma=2.0",), "offset": ("k=2", "folds=2"), "act": ("threshold=0.05",),
    "found_in_the_middle": ('spans=["opening", "mark"]',),
}  # fmt: skip
BY_NAME = ("streaming", "snapkv", "task_kv", "compress_kv", "head_kv", "razor_attention")
# what the scores of each selector come from
SCORED = {"compress_kv": "semantic_retrieval", "head_kv": "retrieval_reasoning",
          "razor_attention": "razor_induction,razor_echo"}  # fmt: skip


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return run_cases.items_file(tmp_path_factory.mktemp("items") / "mine.jsonl")


@pytest.mark.parametrize("name", registry.names("edit"))
def test_every_edit_by_name(call, folder, items, tmp_path, name):
    options = ["--n-profile-items", 6, "--n-dev-items", 2, "--n-test-items", 2, "--n-random-sets", 1]
    given = [part for text in SETTINGS.get(name, ()) for part in ("--set", text)]
    heads = ["--heads", "L0H1,L1H2"]
    arguments = ["steer", folder, "--method", name, "--task", items, "-o", tmp_path / "run", *options, *given, *heads]
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["results"]["steering"]
    found = read_results(tmp_path / "run")["steering"]
    assert found.method == name
    assert {"baseline", "steered"} <= set(found.trials.conditions)
    assert registry.class_named(type(found.edits.edits[0]).__name__, "edit") is registry.get(name, "edit").thing


def test_a_profiled_edit_and_its_report(call, folder, items, tmp_path):
    options = ["--n-profile-items", 4, "--n-dev-items", 3, "--n-test-items", 4, "--n-random-sets", 1]
    arguments = ["steer", folder, "--method", "pasta", "--task", items, "--set", "alpha=0.1", *options]
    code, out, err = call(*arguments, "--head-set-sizes", "2,4", "-o", tmp_path / "run")
    assert code == 0, err
    assert "baseline" in out
    assert call("report", tmp_path / "run", "-o", tmp_path / "report.html")[0] == 0
    assert call("show", tmp_path / "run")[0] == 0


@pytest.mark.parametrize("name", ["PASTA", "Found-In-The-Middle"])
def test_settings_of_a_name_with_capitals_and_hyphens(call, folder, items, tmp_path, name):
    """The settings are those of the canonical name."""
    setting = "alpha=0.1" if name == "PASTA" else 'spans=["opening", "mark"]'
    options = ["--n-profile-items", 2, "--n-dev-items", 2, "--n-test-items", 2, "--n-random-sets", 1, "--heads", "L0H1"]
    arguments = ["steer", folder, "--method", name, "--task", items, "--set", setting, *options]
    code, _, err = call(*arguments, "-o", tmp_path / "run")
    assert code == 0, err


@pytest.mark.parametrize("name", [each for each in registry.names("selector") if each in BY_NAME])
def test_every_selector_by_name(call, folder, tmp_path, name, small):
    analyses = ",".join(filter(None, ("kv", SCORED.get(name))))
    options = [*small, "--n-texts", 1, "--no-check", "--training-steps", 2, "--explorer-tokens", 0]
    chosen = ["--set", f'kv.selectors=["{name}"]', "--set", "kv.keep_ratios=[0.5]"]
    code, _, err = call("score", analyses, folder, "--out", tmp_path / "run", *options, *chosen)
    condition = condition_of(registry.get(name, "selector"))
    found = read_results(tmp_path / "run") if code == 0 else {}
    if code == 2:
        # the tiny model answers no needle, so that its table counts no prompt
        assert name in ("compress_kv", "head_kv"), err
        assert "needs" in err
        return
    assert set(found["kv"].conditions) == {"baseline", "random", condition}


def test_random_keys_alone(call, folder, tmp_path, small):
    options = [*small, "--n-texts", 1, "--set", "kv.selectors=random_keys", "--set", "kv.keep_ratios=[0.5]"]
    code, _, err = call("score", "kv", folder, "--out", tmp_path / "run", *options)
    assert code == 0, err
    assert set(read_results(tmp_path / "run")["kv"].conditions) == {"baseline", "random"}


def test_settings_of_a_selector(call, folder, tmp_path, small):
    options = [*small, "--n-texts", 1, "--set", "kv.selectors=snapkv", "--set", "kv.keep_ratios=[0.5]"]
    code, _, err = call("score", "kv", folder, "--out", tmp_path / "run", *options, "--set", "snapkv.window=8")
    assert code == 0, err
    assert read_results(tmp_path / "run")["kv"].settings["selector_settings"] == {"snapkv": {"window": 8}}
