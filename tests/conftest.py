"""What every test shares: the environment, seeds, the demo model and tiny models of eleven families."""

import os
import sys
from pathlib import Path

# before torch and triton are imported: both read these once
os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "1")
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# importlib mode leaves sys.path alone, and helpers such as families.py stand beside the tests
sys.path[:0] = [str(Path(__file__).parent / "helpers"), str(Path(__file__).parent)]

import browser as browsers
import pytest
from coverage_sample import pytest_collection_modifyitems
from fast_tests import pytest_addoption, pytest_configure, pytest_ignore_collect
from jaxtyping import install_import_hook

# hooks of pytest, which finds them by their names in this module
__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure", "pytest_ignore_collect"]

install_import_hook(["interp.hooks", "interp.analyses"], "shape_checks.checked")


@pytest.fixture(autouse=True)
def seeded():
    """Torch's generator in the same state at the start of every test."""
    # torch and transformers are imported when the first test needs them: the controller of xdist runs none
    import torch

    torch.manual_seed(0)


@pytest.fixture
def call(monkeypatch, capsys):
    """call("score", ...) -> (exit code, stdout, stderr), of the command line."""
    from interp.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["interp", *map(str, arguments)])
        # what a test printed while it made its files is not the command's
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        code = stop.value.code
        return 0 if code is None else code, out, err

    return run


@pytest.fixture(scope="session")
def demo():
    """The demo model and its tokenizer, loaded once; tests must leave the model unchanged."""
    import interp

    return interp.load("demo", device="cpu")


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model("llama") or any other name in families.CONFIGS; made once for all tests, so do not edit it."""
    from interp.testing import families

    made = {}

    def get(name, **settings):
        key = name, *sorted(settings.items())
        if key not in made:
            made[key] = families.make(name, **settings)
        # what a test before left
        made[key].zero_grad()
        return made[key]

    return get


@pytest.fixture(scope="session")
def eager():
    """eager(model, prompt): patterns [l h q k] of one unpadded prompt from the model's own eager attention."""
    # not at the top: reading imports what the hook above is to check
    from capture_oracle import eager_patterns

    from interp.hooks.prompts.prompts import Prompts

    return lambda model, prompt: eager_patterns(model, Prompts((prompt,)))[0]


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; see browser.opened. Not longer than a module: its event loop would be in others' way."""
    with browsers.launched() as found:
        yield found
