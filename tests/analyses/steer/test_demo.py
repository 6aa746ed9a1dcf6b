"""Steering a real model: the papers' rules on probabilities, and what a user sees."""

import pytest
import torch
from steering_oracle import act, key_scale, literal, pasta, zero

import interp
from interp import steer
from interp.hooks.edit.edit import steering
from interp.hooks.read.capture import model_inputs

pytestmark = pytest.mark.slow


def last_logits(model, prompts):
    with torch.no_grad():
        return model(**model_inputs(model, prompts), use_cache=False).logits


@pytest.mark.parametrize("name", ["pasta", "zerotuning", "act", "key scale"])
def test_equals_the_literal_rule_on_the_demo_model(demo, name):
    model, tokenizer = demo
    prompts = interp.tasks.needle(tokenizer, lengths=(170, 190), n=2)
    width = max(prompts.lengths)
    position = torch.arange(width)[None] - (width - torch.tensor(prompts.lengths))[:, None]
    prompt, first = position >= 0, position == 0
    marked = prompts.span_mask("needle", width).gather(1, position.clamp(min=0)) & prompt
    lists, near = [], []

    def rule(layer, pattern):
        if name == "pasta":
            return pasta(pattern, marked, prompt, 0.1)
        if name == "zerotuning":
            return zero(pattern, first, 3.0)
        # a band that no column's mean falls into: exact copies of a hard threshold do not differ there
        changed, sinks, received = act(pattern, prompt, prompt, first, torch.full((2,), 0.25), 0.4)
        lists.append(sinks)
        near.append((received - 0.25).abs()[(prompt & ~first)[:, None].expand_as(received)].min())
        return changed

    edits = {"pasta": steer.Pasta("needle", 0.1), "zerotuning": steer.ZeroTuning(3.0), "act": steer.Act(0.4, 0.25)}
    edit = edits.get(name) or steer.KeyScale(1.2)
    scaled = {"keys": lambda layer, key: key_scale(key, first, 1.2)}
    with literal(model, **(scaled if name == "key scale" else {"rule": rule})):
        expected = last_logits(model, prompts)
    with steering(model, edit, prompts) as context:
        found = last_logits(model, prompts)
    if name == "act":
        print(f"nearest column to the threshold: {min(near):.1e}, sinks {sum(int(s.sum()) for s in lists)}")
        for layer, sinks in enumerate(lists):
            assert torch.equal(context.memory[0, layer], sinks)
    apart = max(float((a[-n:] - b[-n:]).abs().max()) for a, b, n in zip(found, expected, prompts.lengths, strict=True))
    print(f"{name}: {apart:.1e} apart, logits up to {float(expected.abs().max()):.0f}")
    # about 2e-4 at logits of 38; 9e-5 was measured
    assert apart < 5e-6 * float(expected.abs().max())


def test_a_marked_instruction_is_followed(demo):
    model, tokenizer = demo
    chat = [{"role": "user", "content": "Anna is a nurse from Oslo. Write one sentence about her. Answer in JSON."}]
    prompts = interp.Prompts.encode(tokenizer, [chat], spans={"rule": "Answer in JSON."})

    def reply():
        out = model.generate(**model_inputs(model, prompts), max_new_tokens=40, do_sample=False)
        return tokenizer.decode(out[0, prompts.lengths[0] :], skip_special_tokens=True)

    before = reply()
    with steering(model, steer.Boost("rule", 6.0), prompts):
        boosted = reply()
    assert "{" not in before
    assert "{" in boosted
    assert reply() == before
