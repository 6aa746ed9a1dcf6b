"""A tiny model in a folder, and a run that the command made, for tests of the command line."""

import os
import subprocess
import sys

import pytest
import tiny_chat_model

SMALL = [
    *("--n-needles", "2", "--needle-length", "560", "--n-texts", "2", "--text-length", "40", "--heads", "L0H1"),
    *("--n-random-sets", "1", "--n-check-needles", "2", "--check-length", "560", "--batch-size", "2"),
    *("--reply-tokens", "3", "--explorer-tokens", "560"),
]


@pytest.fixture(scope="session")
def small():
    """Options of a quick `interp score`."""
    return SMALL


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer."""
    return str(tiny_chat_model.folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    """A run folder made by the command in a process of its own; tests leave it unchanged."""
    out = tmp_path_factory.mktemp("runs") / "run"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "from interp.cli import main; main()", "score", "retrieval,sinks", folder]
    done = subprocess.run([*command, "--out", str(out), *SMALL], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return out
