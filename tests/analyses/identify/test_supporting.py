"""Heads that hold a refusal up come before heads that oppose it, however large their slopes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from interp import steer
from interp.analyses import identify
from interp.analyses.measures import refusals as measures
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.edit.edit import steering
from interp.hooks.model.heads import Head
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs
from interp.testing import families


def replies_of(model: Any, seed: int) -> measures.Replies:
    rng = torch.Generator().manual_seed(seed)
    prompts = Prompts.from_ids([torch.randint(5, 60, (n,), generator=rng).tolist() for n in (9, 12, 15)])
    return measures.Replies(prompts, ("I cannot",) * 3, (True,) * 3, (7, 8, 9 + seed))


def loss_of(model: Any, replies: measures.Replies, gate: float, head: Head) -> float:
    with torch.no_grad(), steering(model, steer.Gate(gate, heads=str(head)), replies.prompts):
        logits = model(**model_inputs(model, replies.prompts), use_cache=False).logits
    return float(measures.first_token_loss(replies)(logits, replies.prompts).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_more_of_the_first_head_means_less_loss_and_more_of_the_last_means_more(family, seed):
    model: Any = families.make(family)
    replies = replies_of(model, seed)
    slopes = identify.gradient_importance(
        model, replies.prompts, loss=measures.first_token_loss(replies), normalize=None
    )
    found = identify.supporting(slopes)
    order = found.top(found.layers * found.n_heads)
    for head in (order[0], order[-1]):
        change = (loss_of(model, replies, 1.05, head) - loss_of(model, replies, 0.95, head)) / 0.1
        assert float(found.values[head.layer, head.head]) == pytest.approx(-change, rel=0.05, abs=1e-4)
    assert float(found.values.max()) > 0 > float(found.values.min())
    assert torch.equal(found.extras["absolute"], slopes.per_prompt)


def test_a_head_that_opposes_with_the_largest_slope_comes_last():
    signed = torch.tensor([[[-0.5, 9.0], [0.1, -0.2]]])
    slopes = HeadScores("gradient_importance", signed.abs(), extras={"signed": signed})
    assert slopes.top(1) == [Head(0, 1)]
    assert identify.supporting(slopes).top(4) == [Head(0, 0), Head(1, 1), Head(1, 0), Head(0, 1)]


@pytest.mark.parametrize("case", ["by position", "by layer", "other scores"])
def test_scores_without_a_sign_are_refused(case):
    signed = torch.rand(1, 2, 2)
    scores = HeadScores("gradient_importance", signed.abs(), extras={"signed": signed})
    given = {
        "by position": replace(scores, extras={}),
        "by layer": identify.by_layer(scores),
        "other scores": HeadScores("sinks", signed),
    }[case]
    with pytest.raises(UsageError, match="no slopes with a sign"):
        identify.supporting(given)
