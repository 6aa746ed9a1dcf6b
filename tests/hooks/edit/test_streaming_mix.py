"""Mixtures of full and streaming attention: outputs, gradients, and no hook that stays on the model."""

import pytest
import torch
from capture_oracle import eager_patterns, prompts

from interp.errors import UsageError
from interp.hooks.edit.streaming_mix import streaming_mix
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import attention_layers, projection_inputs
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, model_inputs, run
from interp.testing import families

SINK, RECENT = 3, 7


def hidden(model, batch):
    return model.base_model(**model_inputs(model, batch), use_cache=False).last_hidden_state


def gates_of(model, value=1.0):
    layout = HeadLayout.of(model)
    return torch.full((layout.layers, layout.kv_heads), value)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_closed_gate_leaves_the_first_and_last_keys(tiny_model, name):
    """z of layer 0 equals the definition, from the model's own eager pattern, with windows and learned sinks."""
    model, batch = tiny_model(name), prompts((50, 64))
    before = model.config._attn_implementation
    gates = gates_of(model)
    gates[0, 0] = 0.25
    with streaming_mix(model, gates, sink=SINK, recent=RECENT), capture(model, [keep.z(), keep.v()], batch) as cap:
        run(model, batch)
    with capture(model, keep.z(), batch) as plain:
        run(model, batch)
    with torch.no_grad():
        pattern = eager_patterns(model, batch)[:, 0]
    each = 4 // gates.shape[1]
    for row, n in enumerate(batch.lengths):
        p = pattern[row, :, -n:, -n:]
        i, j = torch.arange(n)[:, None], torch.arange(n)
        near = (j < SINK) | (i - j < RECENT)
        # a learned sink stays in the denominator
        rest = 1 - p.sum(-1, keepdim=True)
        if name != "gpt_oss":
            rest = torch.zeros_like(rest)
        kept = p * near
        stream = (kept / (kept.sum(-1, keepdim=True) + rest)) @ cap[keep.v()][row, 0, :, :n].repeat_interleave(each, 0)
        full = plain[keep.z()][row, 0, :, :n]
        mixed = cap[keep.z()][row, 0, :, :n]
        torch.testing.assert_close(mixed[:each], 0.75 * stream[:each] + 0.25 * full[:each], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mixed[each:], full[each:], atol=1e-5, rtol=0)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_gradients_equal_finite_differences(tiny_model, name):
    model, batch = tiny_model(name), prompts((40, 33))
    gates = (0.6 * gates_of(model)).double().requires_grad_()
    aim = torch.randn(2, 40, 64)

    def loss(at):
        with streaming_mix(model, at, sink=SINK, recent=RECENT):
            return (hidden(model, batch) * aim)[0].sum() + (hidden(model, batch) * aim)[1, -33:].sum()

    (found,) = torch.autograd.grad(loss(gates), gates)
    step = 0.02
    with torch.no_grad():
        for layer, group in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            moved = torch.zeros_like(gates)
            moved[layer, group] = step
            slope = (loss(gates + moved) - loss(gates - moved)) / (2 * step)
            assert found[layer, group] == pytest.approx(float(slope), rel=0.05, abs=0.05)
    assert found.abs().max() > 0.5


def test_full_branch_of_another_run(tiny_model):
    """With the model's own outputs as the full branch and all gates 1, the model is unchanged."""
    model, batch = tiny_model("llama"), prompts((40, 33))
    held = {}
    with torch.no_grad(), projection_inputs(model, attention_layers(model), lambda i, x: held.update({i: x.clone()})):
        before = hidden(model, batch)
    with torch.no_grad(), streaming_mix(model, gates_of(model), sink=SINK, recent=RECENT, full=held):
        assert torch.equal(hidden(model, batch), before)
    half = gates_of(model, 0.5)
    with torch.no_grad():
        with streaming_mix(model, half, sink=SINK, recent=RECENT, full=held):
            teacher = hidden(model, batch)
        with streaming_mix(model, half, sink=SINK, recent=RECENT):
            student = hidden(model, batch)
    # layer 0 has the same input in both runs, later layers do not
    assert (teacher - student).abs().max() > 1e-3


def test_open_gates_change_nothing_and_no_hook_stays(tiny_model):
    model, batch = tiny_model("llama"), prompts((40, 33))
    with torch.no_grad():
        before = hidden(model, batch)
        with streaming_mix(model, gates_of(model), sink=SINK, recent=RECENT):
            assert torch.equal(hidden(model, batch), before)
        with (
            pytest.raises(RuntimeError, match="size"),
            streaming_mix(model, gates_of(model, 0.0), sink=1, recent=2, full={0: torch.zeros(1, 1, 8)}),
        ):
            hidden(model, batch)
        assert torch.equal(hidden(model, batch), before)
    assert model.config._attn_implementation == "sdpa"
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_decoding_with_a_cache_equals_one_forward(tiny_model):
    model, batch = tiny_model("llama"), prompts((40,))
    gates = gates_of(model, 0.3)
    with torch.no_grad(), streaming_mix(model, gates, sink=SINK, recent=RECENT):
        inputs = batch.tensors()
        out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        again = model(out).logits[0, 39:-1].argmax(-1)
    assert out[0, 40:].tolist() == again.tolist()


def test_wrong_arguments_are_refused(tiny_model):
    model = tiny_model("llama")
    with (
        pytest.raises(UsageError, match=r"gates of shape \[2, 4\] for a model of 2 layers and 2 kv heads"),
        streaming_mix(model, torch.ones(2, 4), sink=1, recent=1),
    ):
        pass
    with (
        pytest.raises(UsageError, match="sink=1, recent=0: give at least 0 first keys"),
        streaming_mix(model, torch.ones(2, 2), sink=1, recent=0),
    ):
        pass
