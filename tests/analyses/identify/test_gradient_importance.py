"""Importance: slopes against finite differences, invariances, planted heads, and what it refuses."""

from copy import deepcopy

import pytest
import torch
from capture_oracle import prompts
from detectors import prompts as planted_prompts

from interp import steer
from interp.analyses import identify
from interp.analyses.identify.gradient_importance import by_layer
from interp.analyses.measures import losses
from interp.analyses.measures.losses import token_losses
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ModelError, ScoreError, UsageError
from interp.hooks.edit.edit import steering
from interp.testing import planted

LENGTHS = (20, 33, 11)
# one with a kv head for each query head, two with groups
FAMILIES = ("gpt2", "llama", "gemma3")


def last(logits, batch):
    return logits[:, -1, 5] - logits[:, -1, 6]


@pytest.mark.parametrize("loss", [None, last])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_finite_differences(tiny_model, name, loss):
    model, batch = tiny_model(name), prompts(LENGTHS)
    scores = identify.gradient_importance(model, batch, loss=loss, normalize=None, batch_size=2)
    signed = scores.extras["signed"]
    torch.testing.assert_close(scores.per_prompt, signed.abs())
    step = 0.01
    for head in scores:
        ends = []
        for factor in (1 + step, 1 - step):
            with steering(model, steer.Gate(factor=factor, heads=str(head)), batch):
                ends.append(token_losses(model, batch, loss=loss))
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(signed[:, head.layer, head.head], slope, atol=1e-3, rtol=0)
    # far from nothing, so that the bound says something
    assert signed.abs().max() > 0.02


@pytest.mark.parametrize("statistic", ["example", "position"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_scores_the_same_in_any_batch(tiny_model, name, statistic):
    model, batch = tiny_model(name), prompts((24, 40, 30))
    together = identify.gradient_importance(model, batch, statistic=statistic, normalize=None, batch_size=3)
    alone = identify.gradient_importance(model, batch, statistic=statistic, normalize=None, batch_size=1)
    # the largest are some 0.03, by position 0.003
    torch.testing.assert_close(together.per_prompt, alone.per_prompt, atol=1e-7, rtol=1e-5)
    parts = [
        identify.gradient_importance(model, batch[i : i + 1], statistic=statistic, normalize=None) for i in range(3)
    ]
    joined = HeadScores.concat(parts)
    torch.testing.assert_close(by_layer(joined).values, by_layer(together).values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "group"), [("gpt2", [1]), ("llama", [2, 3])])
def test_heads_that_write_nothing_score_nothing(tiny_model, name, group):
    model = deepcopy(tiny_model(name))
    with torch.no_grad():
        if name == "gpt2":
            attention = model.transformer.h[1].attn.c_attn
            attention.weight[:, 128 + 16 : 128 + 32] = 0
            attention.bias[128 + 16 : 128 + 32] = 0
        else:
            model.model.layers[1].self_attn.v_proj.weight[16:] = 0
    for statistic in ("example", "position"):
        values = identify.gradient_importance(model, prompts(LENGTHS), statistic=statistic).values
        assert (values[1, group] == 0).all()
        assert (values > 0).sum() == values.numel() - len(group)


def test_the_statistics_are_what_they_say(tiny_model):
    model, batch = tiny_model("llama"), prompts((25,))
    z, slopes = {}, {}
    for layer, block in enumerate(model.model.layers):

        def see(module, args, layer=layer):
            z[layer] = args[0].detach()
            args[0].register_hook(lambda gradient: slopes.__setitem__(layer, gradient))

        handle = block.self_attn.o_proj.register_forward_pre_hook(see)
        losses.batch_losses(model, batch).sum().backward()
        handle.remove()
    model.zero_grad()
    parts = torch.stack([(z[i] * slopes[i]).unflatten(-1, (4, 16)).sum(-1)[0] for i in range(2)])
    example = identify.gradient_importance(model, batch, normalize=None)
    torch.testing.assert_close(example.per_prompt[0], parts.sum(1).abs(), atol=1e-6, rtol=1e-4)
    position = identify.gradient_importance(model, batch, statistic="position", normalize=None)
    torch.testing.assert_close(position.per_prompt[0], parts.abs().mean(1), atol=1e-7, rtol=1e-4)
    assert not position.extras


def test_layers_are_normalised_with_their_intervals(tiny_model):
    model, batch = tiny_model("llama"), prompts((20, 33, 11, 27))
    slopes = identify.gradient_importance(model, batch, normalize=None)
    shares = identify.gradient_importance(model, batch)
    torch.testing.assert_close(shares.values.norm(dim=1), torch.ones(2))
    norms = slopes.values.norm(dim=1)[:, None]
    torch.testing.assert_close(shares.values, slopes.values / norms)
    # an interval ends at 0 where all numbers of a table are from 0 to 1
    torch.testing.assert_close(shares.low.clamp(min=0), (slopes.low / norms).clamp(min=0))
    assert (shares.low <= shares.values).all()
    assert shares.settings["layer_norms"] == pytest.approx(norms[:, 0].tolist())
    assert (shares.settings["loss"], shares.settings["gradients"]) == ("next token", "float32")
    with pytest.raises(UsageError, match="shares of their layers already"):
        by_layer(shares)
    with pytest.raises(ScoreError, match="differ in settings"):
        HeadScores.concat([identify.gradient_importance(model, part) for part in (batch[:2], batch[2:])])


def test_a_factor_on_the_loss_changes_no_rank(tiny_model):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    one = identify.gradient_importance(model, batch, loss=last)
    other = identify.gradient_importance(model, batch, loss=lambda logits, batch: -7 * last(logits, batch))
    assert one.top(8) == other.top(8)
    torch.testing.assert_close(one.values, other.values, atol=1e-6, rtol=1e-4)
    assert one.settings["loss"] == "last"


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("statistic", ["example", "position"])
def test_planted_heads_come_first(family, statistic):
    """The head that copies and the one that it leans on: the loss of a copy needs both."""
    for seed in range(10):
        truth = planted.make("induction", seed, family)
        scores = identify.gradient_importance(
            truth.model, planted_prompts("induction", seed), statistic=statistic, normalize=None
        )
        assert set(scores.top(2)) == {truth.head, truth.helper}, f"seed {seed}: {scores}"


def test_nothing_stays_on_the_model(tiny_model):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    model.zero_grad()
    weight = model.model.embed_tokens.weight.requires_grad_(False)
    try:
        with torch.no_grad():
            first = identify.gradient_importance(model, batch)
        with torch.inference_mode():
            second = identify.gradient_importance(model, batch)
        with pytest.raises(UsageError, match="has no gradient"):
            identify.gradient_importance(model, batch, loss=lambda logits, batch: logits.detach()[:, -1, 0])
        assert torch.equal(first.values, second.values)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not weight.requires_grad
        assert model.model.norm.weight.requires_grad
    finally:
        weight.requires_grad_(True)


def test_what_it_refuses(tiny_model):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    with pytest.raises(UsageError, match="a sum over the batch depends on its size"):
        identify.gradient_importance(model, batch, statistic="batch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="normalize is 'layer' or None"):
        identify.gradient_importance(model, batch, normalize="global")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="return one number for each prompt"):
        identify.gradient_importance(model, batch, loss=lambda logits, batch: logits.mean())
    with pytest.raises(ModelError, match="float16, whose gradients overflow"):
        identify.gradient_importance(deepcopy(model).half(), batch)


def test_bfloat16_is_taken_and_named(tiny_model):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    coarse = identify.gradient_importance(deepcopy(model).bfloat16(), batch)
    assert coarse.settings["gradients"] == "bfloat16"
    assert coarse.compare(identify.gradient_importance(model, batch), k=2).spearman > 0.8
