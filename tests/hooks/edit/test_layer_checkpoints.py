"""Layers that the backward pass computes again: equal gradients, and a model that is left as it was."""

import contextlib
from copy import deepcopy

import pytest
import torch
from capture_oracle import prompts

from interp.errors import UsageError
from interp.hooks.edit.head_gate_gradient import gate_gradient
from interp.hooks.edit.layer_checkpoints import layer_checkpoints
from interp.hooks.edit.partial_forward import decoder_layers
from interp.hooks.edit.streaming_mix import streaming_mix
from interp.hooks.model.heads import HeadLayout
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, model_inputs
from interp.testing import families


def loss_of(model, batch, **settings):
    inputs = model_inputs(model, batch)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(**inputs, labels=labels, **{"use_cache": False, **settings}).loss


def slopes(model, batch, context, **settings):
    """Gradients of all weights, as copies."""
    model.zero_grad()
    with context:
        loss_of(model, batch, **settings).backward()
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def assert_equal(found, expected):
    assert any(each is not None and each.abs().max() > 0 for each in expected)
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_gradients_of_all_weights_are_equal_to_the_bit(tiny_model, name):
    model, batch = tiny_model(name), prompts((40, 33))
    assert_equal(slopes(model, batch, layer_checkpoints(model)), slopes(model, batch, contextlib.nullcontext()))


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_gradients_of_gates_are_equal_to_the_bit(tiny_model, name, by_position):
    model, batch = tiny_model(name), prompts((40, 33))
    found = []
    for checkpoint in (True, False):
        with gate_gradient(model, by_position=by_position, checkpoint=checkpoint) as gates:
            loss_of(model, batch).backward()
        found.append(gates.gradient)
    assert torch.equal(*found)
    assert found[0].abs().max() > 1e-4


def test_gradients_on_the_demo_model(demo):
    model, tokenizer = demo
    from interp.analyses import tasks

    batch = tasks.repeated(tokenizer, n=2, batch=2)
    found = []
    for checkpoint in (True, False):
        with gate_gradient(model, checkpoint=checkpoint) as gates:
            loss_of(model, batch).backward()
        found.append(gates.gradient)
    model.zero_grad()
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_gradients_of_streaming_gates_are_equal_to_the_bit(tiny_model, name):
    model, batch = tiny_model(name), prompts((70, 63))
    layout = HeadLayout.of(model)
    found = []
    for context in (layer_checkpoints(model), contextlib.nullcontext()):
        gates = torch.full((layout.layers, layout.kv_heads), 0.6, requires_grad=True)
        with streaming_mix(model, gates, sink=2, recent=5), context:
            loss_of(model, batch).backward()
        found.append(gates.grad)
    assert torch.equal(*found)
    assert found[0].abs().max() > 1e-4


def test_two_losses_of_one_context_and_a_graph_that_is_used_twice(tiny_model):
    model = tiny_model("llama")
    one, other = prompts((20, 13), seed=1), prompts((20, 13), seed=2)
    found = []
    for checkpoint in (True, False):
        with gate_gradient(model, checkpoint=checkpoint) as gates:
            loss = loss_of(model, one) + 2 * loss_of(model, other)
            loss.backward(retain_graph=True)
            loss.backward()
        found.append(gates.gradient)
    assert torch.equal(*found)


def test_dropout_is_repeated(tiny_model):
    model = deepcopy(tiny_model("gpt2"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model.train()
    found = []
    for context in (layer_checkpoints(model), contextlib.nullcontext()):
        torch.manual_seed(7)
        found.append(slopes(model, prompts((40, 33)), context))
    assert_equal(*found)
    assert model.training


def test_a_forward_pass_with_a_cache_is_left_as_it_is(tiny_model):
    model, batch = tiny_model("llama"), prompts((40,))
    inputs = model_inputs(model, batch)
    with layer_checkpoints(model):
        out = model(**inputs, use_cache=True)
        out.logits.square().mean().backward()
    assert out.past_key_values.get_seq_length() == 40
    with gate_gradient(model) as gates:
        loss_of(model, batch, use_cache=True).backward()
    with gate_gradient(model, checkpoint=False) as plain:
        loss_of(model, batch).backward()
    torch.testing.assert_close(gates.gradient, plain.gradient)


def test_a_capture_reads_the_first_pass_alone(tiny_model):
    model, batch = tiny_model("llama"), prompts((40, 33))
    kept = [keep.z(), keep.lse(), keep.v()]
    found = []
    for context in (layer_checkpoints(model), contextlib.nullcontext()):
        with context, capture(model, kept, batch) as cap:
            loss_of(model, batch).backward()
        found.append([cap[each] for each in kept])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        # rows of padding are NaN in some reductions
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_is_left_as_it_was(tiny_model, name):
    model, batch = tiny_model(name), prompts((20,))
    blocks = list(decoder_layers(model).values())

    def replaced(*args, **kwargs):
        return type(blocks[1]).forward(blocks[1], *args, **kwargs)

    # as accelerate does
    blocks[1].__dict__["forward"] = replaced
    try:
        state = [dict(vars(module)) for module in model.modules()]
        hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
        with layer_checkpoints(model):
            loss_of(model, batch).backward()
        with pytest.raises(KeyError), layer_checkpoints(model):
            raise KeyError
        assert [dict(vars(module)) for module in model.modules()] == state
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
        assert not model.is_activation_checkpointing
        assert not model.training
        assert "forward" not in blocks[0].__dict__
        assert blocks[1].__dict__["forward"] is replaced
    finally:
        del blocks[1].__dict__["forward"]


def test_a_backward_pass_after_the_context_is_refused(tiny_model):
    model = tiny_model("llama")
    with layer_checkpoints(model):
        loss = loss_of(model, prompts((20,)))
    with pytest.raises(UsageError, match=r"call backward\(\) inside the context"):
        loss.backward()


def test_passes_without_gradients_are_the_same(tiny_model):
    model, batch = tiny_model("llama"), prompts((20,))
    with torch.no_grad():
        before = loss_of(model, batch)
        with layer_checkpoints(model):
            assert torch.equal(loss_of(model, batch), before)
