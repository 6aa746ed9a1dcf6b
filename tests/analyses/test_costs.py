"""Costs: every declared cost equals what hooks count while the analysis runs on a tiny model."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
from tokenizers_tiny import byte_level
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from interp.analyses import costs, registry, tasks
from interp.analyses.tasks import standard
from interp.hooks.model.repeats import is_repeating
from interp.hooks.read.capture import Capture

SIZES = standard.PromptSizes(
    n_needles=3, needle_length=700, n_texts=3, text_length=60, n_repeated=9, n_pairs=4, training_steps=4
)
ENTRIES = [
    entry
    for entry in registry.entries()
    if entry.thing.__module__.startswith("interp.analyses.identify.") and entry.prompts is not None and not entry.needs
]
"""methods that find heads on standard prompts"""
OWN = {
    # what the standard prompts of a tokenizer of bytes would make long
    "qada": {"sink": 2, "window": 16, "refresh": 8, "min_keys": 8},
    "retrieval": {"max_new_tokens": 5},
    "semantic_retrieval": {"max_new_tokens": 5},
    "retrieval_reasoning": {"max_new_tokens": 5},
    "lookback": {"max_new_tokens": 5},
    # the estimate counts every prompt, and a random model answers none of them right
    "function_vectors": {"right_only": False},
    "duo_gates": {"steps": 4, "batch_size": 1, "sink": 1, "recent": 8},
}
SWEEPS = ("activation_patching", "path_patching")
DECODING = ("retrieval", "semantic_retrieval", "retrieval_reasoning", "lookback")
MADE = {
    "context_entropy": lambda sizes, tokenizer: tasks.contexts(tokenizer, questions=1, each=3, length=700),
    "duo_gates": lambda sizes, tokenizer: tasks.passkeys(tokenizer, n=2, lengths=(900,), keys=2, words=2),
}
"""shorter prompts, where the standard ones are too long or too short for a tokenizer of bytes"""
BATCH = 2


@pytest.fixture(scope="module")
def tiny():
    """A llama of three layers with 4 query heads and 2 kv heads, and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, eos_token_id=299, pad_token_id=298,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), byte_level(bos=True, chat=False)


@contextlib.contextmanager
def counting(model):
    """Passes and tokens that run, as a mean over layers, and the bytes that captures hold at once."""
    found = {"passes": 0.0, "tokens": 0.0, "held": 0}
    layers = model.model.layers

    def count(module, args, output):
        if is_repeating():
            # counted as arithmetic of the backward pass
            return
        rows, queries = args[0].shape[:2]
        found["passes"] += rows / len(layers)
        found["tokens"] += rows * queries / len(layers)

    before = Capture.__exit__

    def leave(self, kind, error, trace):
        held = sum(size_of(part) for chunks in self._chunks.values() for part in chunks.parts)
        found["held"] = max(found["held"], held)
        return before(self, kind, error, trace)

    # a resumed pass calls the layers that it skips, but not what is in them
    handles = [layer.mlp.down_proj.register_forward_hook(count) for layer in layers]
    try:
        with mock.patch.object(Capture, "__exit__", leave):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def size_of(value):
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value)) if isinstance(value, tuple | list) else 0


@pytest.mark.parametrize(
    "entry",
    # a sweep over all heads of the demo model, for each of its pairs of prompts
    [pytest.param(entry, marks=pytest.mark.slow if entry.name in SWEEPS else ()) for entry in ENTRIES],
    ids=lambda entry: entry.name,
)
def test_declared_cost_is_what_runs(tiny, demo, entry):
    name = entry.name
    model, tokenizer = tiny
    if entry.group == "patching":
        model, tokenizer = demo.model, demo.tokenizer
    make: Any = MADE.get(name, entry.prompts)
    prompts = make(SIZES, tokenizer)
    settings = dict(OWN.get(name, {}))
    estimated = entry.cost(model, prompts, BATCH, settings)
    sides = (prompts,) if not entry.paired else prompts[::-1] if entry.partners_first else prompts
    with counting(model) as found:
        entry.thing(model, *sides, **{"batch_size": BATCH, **settings})
    tolerance = 0.1 if name in DECODING else 0.02 if name == "duo_gates" else 1e-6
    assert estimated.forward_passes == pytest.approx(found["passes"], rel=tolerance)
    assert estimated.tokens == pytest.approx(found["tokens"], rel=tolerance)
    if found["held"]:
        assert 0.5 <= estimated.held_megabytes * 1e6 / found["held"] <= 2
    assert estimated.teraflops > 0


def test_costs_add_up_and_memory_does_not(tiny):
    one = costs.Cost(2, 10, 1.0, 5.0)
    assert costs.total(iter([one, costs.Cost(1, 5, 0.5, 7.0)])) == costs.Cost(3, 15, 1.5, 7.0)


def test_positional_holds_no_row(tiny):
    model, tokenizer = tiny
    prompts = standard.repeated(copies=1, times=2)(SIZES, tokenizer)
    with counting(model) as found:
        registry.get("positional").thing(model, prompts)
    assert found["held"] == 0
    assert registry.get("positional").cost(model, prompts, BATCH, {}).held_megabytes == 0


def test_a_gate_is_a_pass_more(tiny):
    model, tokenizer = tiny
    prompts = standard.passages(SIZES, tokenizer)
    plain, gated = costs.reading(), costs.gated(costs.reading())
    one = plain(model, prompts, BATCH, {})
    assert gated(model, prompts, BATCH, {}).forward_passes == 2 * one.forward_passes
    assert gated(model, prompts, BATCH, {"right_only": False}) == one


def test_arithmetic_by_hand(tiny):
    model, tokenizer = tiny
    prompts = standard.passages(SIZES, tokenizer)[:1]
    parameters, n = sum(p.numel() for p in model.parameters()), 60
    expected = 2 * parameters * n + 4 * 3 * 4 * 8 * n * n / 2
    assert costs.reading()(model, prompts, 1, {}).teraflops == pytest.approx(expected / 1e12)
