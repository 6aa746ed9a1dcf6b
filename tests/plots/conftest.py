"""The explored prompt that tests of the explorer share, and its page."""

from dataclasses import replace
from pathlib import Path

import browser as browsers
import pytest
import torch
from explorer_page import BLOCK, N, ready, rounded

from interp import plots
from interp.analyses.views.explore import Explored, explore
from interp.hooks.prompts.prompts import Prompts


@pytest.fixture(scope="session")
def explored(tiny_model) -> Explored:
    """Random attention of eight heads on 300 tokens, rounded as in a page: two heads with top keys, seven maps.

    The last query of L1H2 attends to the needle.
    """
    model = tiny_model("llama")
    ids = torch.randint(3, model.config.vocab_size, (N,), generator=torch.Generator().manual_seed(0))
    prompts = Prompts.from_ids([ids.tolist()], spans=[{"needle": (40, 50), "answer": (44, 47), "question": (285, 295)}])
    found = explore(model, prompts, heads="L0H1, L1H2", maps="L0, L1H0, L1H1, L1H2", block=BLOCK, title="A needle")
    found.keys[1, -1, 0], found.probs[1, -1, 0] = 45, 0.9
    words = tuple("\n" if i % 40 == 7 else f" word{i}" for i in range(N))
    return rounded(replace(found, tokens=words))


@pytest.fixture(scope="session")
def page(explored, tmp_path_factory) -> Path:
    return plots.explorer(explored).save(tmp_path_factory.mktemp("explorer") / "explorer.html")


@pytest.fixture
def shown(browser, page):
    with browsers.opened(browser, page) as watched:
        ready(watched)
        yield watched
        watched.clean()
