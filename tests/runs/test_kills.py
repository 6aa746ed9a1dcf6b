"""Processes that are killed, and processes that start at the same moment, leave whole runs of one plan."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_chat_model
from run_cases import difference

from interp.runs.results import is_finished, read_results

ROOT = Path(__file__).resolve().parents[2]
N_KILLS = int(os.environ.get("INTERP_KILLS", "12"))
"""by hand: INTERP_KILLS=100 python -m pytest -m slow tests/runs/test_kills.py"""
N_PAIRS = int(os.environ.get("INTERP_PAIRS", "4"))
OPTIONS = ["--n-texts", "6", "--text-length", "40", "--batch-size", "1", "--explorer-tokens", "0", "--no-check"]
ANALYSES = "previous_token,sinks,induction,duplicate_token"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_chat_model.folder(tmp_path_factory.mktemp("model") / "tiny")


def start(model_folder, out, *more):
    command = [sys.executable, "-c", "from interp.cli import main; main()", "score", ANALYSES, str(model_folder)]
    return subprocess.Popen(
        [*command, "--out", str(out), *OPTIONS, *more], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """The run in one go, and the seconds from its start to its first file and to its end."""
    out, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    process = start(model_folder, out)
    while not (out / "manifest.json").exists() and process.poll() is None:
        time.sleep(0.02)
    first = time.monotonic() - began
    assert process.wait() == 0, process.stderr
    return read_results(out), first, time.monotonic() - began


def state(out):
    """The results of a run, None before its manifest or its first cell; any other refusal is a fault."""
    if not (out / "manifest.json").exists() or not list(out.glob("cells/*/*.json")):
        return None
    return read_results(out)


def test_runs_that_are_killed_at_any_moment_end_with_the_same_results(whole, model_folder, tmp_path):
    found, first, last = whole
    rng, out, number = random.Random(0), tmp_path / "0", 0
    for kill in range(N_KILLS):
        process = start(model_folder, out)
        time.sleep(rng.uniform(first * 0.9, last))
        process.send_signal(signal.SIGKILL)
        process.wait()
        part = state(out)
        if part is None:
            continue
        for name, result in part.results.items():
            assert name in part.unfinished or not difference(result, found[name], name), f"kill {kill}"
        if is_finished(out):
            number += 1
            out = tmp_path / str(number)
    assert start(model_folder, out).wait() == 0
    assert not difference(read_results(out).results, found.results)
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_plans_that_start_together_are_not_mixed(whole, model_folder, tmp_path):
    for pair in range(N_PAIRS):
        out = tmp_path / str(pair)
        processes = [start(model_folder, out, "--seed", seed) for seed in ("0", "1")]
        errors = [process.communicate()[1].decode() for process in processes]
        codes = [process.returncode for process in processes]
        assert sorted(codes) == [0, 2], errors
        assert "another" in errors[codes.index(2)]
        found = read_results(out)
        assert not found.unfinished
        assert found.settings["sizes"]["seed"] == codes.index(0)
        if codes[0] == 0:
            assert not difference(found.results, whole[0].results)
