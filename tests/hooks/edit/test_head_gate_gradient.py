"""Gradients of head gates against finite differences, and no hook that stays on the model."""

import pytest
import torch
from capture_oracle import prompts

from interp.errors import UsageError
from interp.hooks.edit.head_gate_gradient import gate_gradient
from interp.hooks.model.layers import projection_inputs
from interp.hooks.read.capture import model_inputs


def loss_of(model, batch):
    inputs = model_inputs(model, batch)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(**inputs, labels=labels, use_cache=False).loss


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss"])
def test_equals_finite_differences(tiny_model, family):
    model = tiny_model(family)
    batch = prompts((20, 13))
    with gate_gradient(model) as gates:
        loss_of(model, batch).backward()
    found = gates.gradient
    heads = gates.layout.heads
    assert found.shape == (2, gates.layout.layers, heads)
    for layer, head in ((0, 0), (gates.layout.layers - 1, heads - 1)):
        losses = []
        for gate in (1.03, 0.97):

            def scaled(_, x, gate=gate, head=head):
                z = x.unflatten(-1, (heads, -1)).clone()
                z[:, :, head] *= gate
                return z.flatten(-2)

            with projection_inputs(model, [layer], scaled), torch.no_grad():
                losses.append(loss_of(model, batch).double())
        slope = (losses[0] - losses[1]) / 0.06
        torch.testing.assert_close(found[:, layer, head].sum().double(), slope, atol=2e-5, rtol=2e-2)


def test_frozen_weights_and_several_backward_passes(tiny_model):
    model = tiny_model("llama")
    batch = prompts((20, 13))
    with gate_gradient(model) as once:
        loss_of(model, batch).backward()
    flags = [p.requires_grad for p in model.parameters()]
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        with gate_gradient(model) as twice:
            loss_of(model, batch).backward()
            loss_of(model, batch).backward()
    finally:
        for p, flag in zip(model.parameters(), flags, strict=True):
            p.requires_grad_(flag)
    torch.testing.assert_close(twice.gradient, 2 * once.gradient)


def test_errors_and_exit(tiny_model):
    model = tiny_model("llama")
    before = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    with pytest.raises(UsageError, match="no_grad"), gate_gradient(model), torch.no_grad():
        loss_of(model, prompts((12,)))
    with gate_gradient(model) as gates:
        loss_of(model, prompts((12,)))
    with pytest.raises(UsageError, match="no gradient reached layers"):
        _ = gates.gradient
    assert before == {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
