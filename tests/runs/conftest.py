"""The small chat model of the tests of runs, one for each module."""

import shutil
from dataclasses import replace

import pytest
import run_cases
import tiny_chat_model

from interp.runs.run import Run

CHECKED = run_cases.score_plan("previous_token", "sinks", check=False, heads="")
"""the plan of `made`"""


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_chat_model.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_chat_model.model()


@pytest.fixture(scope="module")
def made(model, tokenizer, tmp_path_factory):
    """Folders of two runs that differ in their seed, and the results of the first."""
    place = tmp_path_factory.mktemp("runs")
    other = replace(CHECKED, sizes=replace(CHECKED.sizes, seed=1))
    found = Run.open(place / "one", CHECKED, model, tokenizer).finish(progress=False)
    Run.open(place / "other", other, model, tokenizer).finish(progress=False)
    return place / "one", place / "other", found


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run")
