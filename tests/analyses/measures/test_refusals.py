"""The loss of the first token of a reply, its value and its sign, and the contrast of refusals."""

import math

import pytest
import torch

from interp.analyses.measures.refusals import Replies, check_contrast, first_token_loss
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts

PROMPTS = Prompts.from_ids([[5, 6, 7], [8, 9, 10]])
REPLIES = Replies(PROMPTS, ("no", "no"), (True, True), (2, 0))


def logits_of(*probabilities: list[float]) -> torch.Tensor:
    """Logits of three tokens after the last position; earlier positions hold others."""
    last = torch.tensor(probabilities).log()[:, None]
    return torch.cat([torch.full((len(probabilities), 2, 3), 50.0), last], 1)


@pytest.mark.parametrize("shift", [0.0, -30.0, 400.0])
def test_the_loss_is_minus_the_log_of_the_probability(shift):
    logits = logits_of([0.7, 0.2, 0.1], [0.6, 0.3, 0.1]) + shift
    found = first_token_loss(REPLIES)(logits, PROMPTS)
    torch.testing.assert_close(found, torch.tensor([-math.log(0.1), -math.log(0.6)]), atol=1e-4, rtol=1e-5)


def test_the_loss_falls_where_the_token_becomes_likelier():
    loss = first_token_loss(REPLIES)
    less, more = (loss(logits_of([0.8 - p, 0.2, p], [p, 0.9 - p, 0.1]), PROMPTS) for p in (0.1, 0.5))
    assert bool((more < less).all())
    logits = logits_of([0.7, 0.2, 0.1], [0.6, 0.3, 0.1]).requires_grad_()
    loss(logits, PROMPTS).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, -1].sign().tolist() == [1, 1, -1]
    assert logits.grad[1, -1].sign().tolist() == [-1, 1, 1]
    assert not bool(logits.grad[:, :-1].any())


def test_prompts_are_found_by_their_tokens():
    logits = logits_of([0.7, 0.2, 0.1], [0.6, 0.3, 0.1])
    turned = Prompts.from_ids([[8, 9, 10], [5, 6, 7]])
    found = first_token_loss(REPLIES)(logits.flip(0), turned)
    torch.testing.assert_close(found, first_token_loss(REPLIES)(logits, PROMPTS).flip(0))


@pytest.mark.parametrize("tokens", [(-1, 0), (2, -1)])
def test_a_prompt_without_a_reply_is_refused(tokens):
    loss = first_token_loss(Replies(PROMPTS, ("", "no"), (False, True), tokens))
    with pytest.raises(UsageError, match="has no reply to begin with"):
        loss(logits_of([0.7, 0.2, 0.1], [0.6, 0.3, 0.1]), PROMPTS)


@pytest.mark.parametrize(
    ("harmful", "harmless", "shows"), [(30, 0, True), (15, 3, True), (15, 28, False), (6, 30, False), (10, 9, False)]
)
def test_a_contrast_needs_more_refusals_of_harmful_requests(harmful, harmless, shows):
    prompts = Prompts.from_ids([[5]] * 30)
    first, second = (Replies(prompts, ("",) * 30, (True,) * n + (False,) * (30 - n)) for n in (harmful, harmless))
    if shows:
        check_contrast(first, second)
    else:
        with pytest.raises(UsageError, match=f"refuses {harmful} of 30 harmful and {harmless} of 30 harmless"):
            check_contrast(first, second)
