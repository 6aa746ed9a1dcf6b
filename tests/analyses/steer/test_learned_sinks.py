"""Steering in a model with learned sinks: the sink keeps its logit, so it is one more key that no edit names."""

import pytest
import torch
from steering_oracle import batch, literal, logits, pasta, real, spotlight, weighed, zero

from interp import steer
from interp.hooks.edit.edit import steering
from interp.testing.families import make

EDITS = {
    "pasta": steer.Pasta("mark", 0.05),
    "zerotuning": steer.ZeroTuning(3.0),
    "boost": steer.Boost("mark", 5.0),
    "spotlight": steer.SpotLight("mark", 0.3),
}


@pytest.mark.parametrize("name", EDITS)
def test_logits_are_those_of_the_papers_rule(name):
    model, prompts = make("gpt_oss"), batch()
    width = max(prompts.lengths)
    position = torch.arange(width)[None] - (width - torch.tensor(prompts.lengths))[:, None]
    prompt, first = position >= 0, position == 0
    mark = prompts.span_mask("mark", width).gather(1, position.clamp(min=0)) & prompt
    prompt, first, mark = (torch.nn.functional.pad(keys, (0, 1)) for keys in (prompt, first, mark))

    def rule(layer, pattern):
        assert pattern.shape[-1] == width + 1
        if name == "pasta":
            return pasta(pattern, mark, prompt, 0.05)
        if name == "zerotuning":
            return zero(pattern, first, 3.0)
        if name == "boost":
            return weighed(pattern, torch.where(mark, 5.0, 1.0)[:, None, None])
        return spotlight(pattern, mark, 0.3)

    with literal(model):
        base = logits(model, prompts)
    torch.testing.assert_close(real(base, prompts), real(logits(model, prompts), prompts), atol=1e-5, rtol=1e-5)
    with literal(model, rule):
        wanted = logits(model, prompts)
    with steering(model, EDITS[name], prompts):
        found = logits(model, prompts)
    torch.testing.assert_close(real(found, prompts), real(wanted, prompts), atol=1e-5, rtol=1e-5)
    assert (real(found, prompts) - real(base, prompts)).abs().max() > 1e-3
