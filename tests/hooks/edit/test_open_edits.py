"""Contexts that would act twice by mistake, or that a change of the attention implementation leads past interp."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from capture_oracle import prompts
from transformers import PreTrainedModel

from interp.analyses import kv, steer
from interp.analyses.kv.selecting import selecting
from interp.errors import UsageError
from interp.hooks.edit.ablation import Intervention, ablate, intervene
from interp.hooks.edit.edit import steering
from interp.hooks.edit.per_row_steering import steering_rows
from interp.hooks.edit.streaming_mix import streaming_mix
from interp.hooks.model.heads import HeadSet
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, run
from interp.testing import families

SETS = [HeadSet.parse("L0H1"), HeadSet.parse("L1H2")]
GATES = torch.full((2, 2), 0.5)
TWICE = {
    "steering": lambda m, p: steering(m, steer.Boost("mark", 2.0), p),
    "one of two edits": lambda m, p: steering(m, steer.Temperature(0.5) + steer.Boost("mark", 2.0), p),
    "a gate": lambda m, p: steering(m, steer.Gate(0.5)),
    "a selector": lambda m, p: selecting(m, kv.Streaming(0.5, n_sink=1, n_recent=2), p),
    "head sets": lambda m, p: steering_rows(m, steer.Boost("mark", 2.0), p, SETS),
    "a factor": lambda m, p: intervene(m, Intervention("scale", factor=0.5), SETS),
    "a mixture": lambda m, p: streaming_mix(m, GATES, sink=1, recent=4),
}


@pytest.mark.parametrize("name", TWICE)
def test_an_edit_that_is_open_is_refused_and_may_be_opened_again(tiny_model, name):
    model, batch = tiny_model("llama"), prompts((20, 30))
    for _ in range(2):
        with TWICE[name](model, batch):
            refused = pytest.raises(UsageError, match=r"already open on this model.* close the first context, or ")
            with refused, TWICE[name](model, batch):
                pass
            # another model, and a context that failed, are in nobody's way
            with contextlib.suppress(ValueError), TWICE[name](tiny_model("qwen3"), batch):
                raise ValueError
            run(model, batch)


@pytest.mark.parametrize("name", TWICE)
def test_an_edit_of_another_thread_is_in_nobodys_way(name):
    model, batch = families.make("llama"), prompts((20, 30))
    with TWICE[name](model, batch):
        expected = run(model, batch).logits
    # a selector hides keys from the tokens after a prompt, of which there are none here
    assert name == "a selector" or (expected - run(model, batch).logits).abs().max() > 1e-4

    def other() -> torch.Tensor:
        with TWICE[name](model, batch):
            return run(model, batch).logits

    with ThreadPoolExecutor(1) as pool, TWICE[name](model, batch):
        assert torch.equal(pool.submit(other).result(), expected)
        assert torch.equal(run(model, batch).logits, expected)
        refused = pytest.raises(UsageError, match="already open on this model")
        with refused, TWICE[name](model, batch):
            pass


def test_the_implementation_of_another_model_leaves_open_contexts_as_they_are():
    model, other, batch = families.make("llama"), families.make("llama"), prompts((20, 30))
    with steering(model, steer.Boost("mark", 5.0), batch):
        named = model.config._attn_implementation
        expected = run(model, batch).logits
        other.set_attn_implementation("eager")
        assert model.config._attn_implementation is named
        assert torch.equal(run(model, batch).logits, expected)
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "eager")


ALLOWED = {
    "a sum": lambda m, p: [steering(m, steer.Temperature(0.5) + steer.Temperature(0.5))],
    "other settings": lambda m, p: [steering(m, steer.Temperature(0.5)), steering(m, steer.Temperature(0.25))],
    "other heads": lambda m, p: [steering(m, steer.Gate(0.5, heads=h)) for h in ("L0H1", "L0H2")],
    "no effect": lambda m, p: [steering(m, steer.Temperature(1.0)), steering(m, steer.Temperature(1.0))],
    "the same outputs": lambda m, p: [ablate(m, "L0H1", "uniform"), ablate(m, "L0H1", "uniform")],
}


@pytest.mark.parametrize("name", ALLOWED)
def test_other_contexts_nest(tiny_model, name):
    model, batch = tiny_model("llama"), prompts((20, 30))
    with contextlib.ExitStack() as stack:
        for context in ALLOWED[name](model, batch):
            stack.enter_context(context)
        run(model, batch)


def test_a_capture_is_entered_once_at_a_time(tiny_model):
    model, batch = tiny_model("llama"), prompts((20, 30))
    cap = capture(model, keep.entropy(), batch)
    with cap, pytest.raises(UsageError, match="this capture is open already"), cap:
        pass
    with cap:
        run(model, batch)
    assert cap.lengths == (20, 30)
    assert model.config._attn_implementation == "sdpa"


CONTEXTS = {
    "steering": lambda m, p: steering(m, steer.Boost("mark", 5.0, heads="L0H1"), p),
    "a selector": lambda m, p: selecting(m, kv.Streaming(0.5, n_sink=1, n_recent=2), p),
    "first": lambda m, p: ablate(m, "L0H1", "first"),
    "capture": lambda m, p: capture(m, keep.mass("mark"), p),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_acts_whatever_implementation_is_set_inside_of_it(name):
    model: Any = families.make("llama")
    batch = prompts((20, 30))
    before = PreTrainedModel.set_attn_implementation
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    found = []
    for change in (False, True):
        with CONTEXTS[name](model, batch) as context:
            if change:
                model.set_attn_implementation("eager")
            out = model.generate(**batch.tensors(), **settings, return_dict_in_generate=True)
        found.append(torch.stack(out.logits))
        assert model.config._attn_implementation == ("eager" if change else "sdpa")
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    if name == "capture":
        assert context.lengths == (23, 33)
    assert PreTrainedModel.set_attn_implementation is before


def test_layers_that_no_context_needs_run_the_implementation_that_was_set(monkeypatch):
    from transformers.models.llama import modeling_llama

    model, batch, calls = families.make("llama"), prompts((20, 30)), []
    eager = modeling_llama.eager_attention_forward

    def counted(module, *args, **kwargs):
        calls.append(module.layer_idx)
        return eager(module, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counted)
    with ablate(model, "L0H1", "first"):
        model.set_attn_implementation("eager")
        run(model, batch)
    assert calls == [1]


@pytest.mark.parametrize("name", CONTEXTS)
def test_an_implementation_written_into_the_config_is_reported(name):
    model, batch = families.make("llama"), prompts((20, 30))
    refused = pytest.raises(UsageError, match="'eager' inside a context of interp, which read and edited nothing")
    with refused, CONTEXTS[name](model, batch):
        model.config._attn_implementation = "eager"
        run(model, batch)
    # it stays as the user wrote it
    assert model.config._attn_implementation == "eager"
    with CONTEXTS[name](model, batch):
        run(model, batch)
