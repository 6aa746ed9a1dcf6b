"""Which keys PASTA lowers by its scope: the prompt ends with its last token, and the next key is generated."""

import pytest
import torch
from steering_oracle import batch, literal, logits, real, weighed

from interp import steer
from interp.hooks.edit.edit import steering
from interp.hooks.prompts.prompts import Prompts

LENGTHS, NEW = (17, 23), 4
# which of the keys, by position, each scope lowers; the span has the positions 4 to 7 of the first prompt
LOWERED = {
    "prompt": lambda place, length, marked: (place < length) & ~marked,
    "generated": lambda place, length, marked: place < length,
    "all": lambda place, length, marked: ~marked,
}


@pytest.mark.parametrize("chunks", [1, 3], ids=["recompute", "cache"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("scope", LOWERED)
def test_keys_of_a_scope_are_lowered_and_no_others(tiny_model, scope, family, chunks):
    alpha, of_sink = 0.05, family == "gpt_oss"
    model, asked = tiny_model(family, attn_implementation="eager"), batch(LENGTHS)
    longer = Prompts.from_ids([[*prompt.ids, *range(7, 7 + NEW)] for prompt in asked])
    width = max(longer.lengths)
    weights = []
    for number, length in enumerate(LENGTHS):
        place = torch.arange(width) - (width - length - NEW)
        marked = (place >= 4 + number) & (place < 8 + number)
        lowered = (place > 0) & LOWERED[scope](place, length, marked)
        weights.append(torch.where(lowered, alpha, 1.0))
    weight = torch.nn.functional.pad(torch.stack(weights), (0, int(of_sink)), value=1.0)
    with literal(model, lambda layer, pattern: weighed(pattern, weight[:, None, None, : pattern.shape[-1]])):
        expected = logits(model, longer)
    with steering(model, steer.Pasta("mark", alpha, scope=scope, protect_first=True), asked), torch.no_grad():
        if chunks == 1:
            # the prompt first, so that the context knows where it ends
            logits(model, asked)
            found = logits(model, longer)
        else:
            inputs = longer.tensors()
            mask = inputs["attention_mask"]
            place, parts, cache, start = (mask.cumsum(-1) - 1).clamp(min=0), [], None, 0
            for stop in (width - NEW, width - 2, width):
                out = model(
                    input_ids=inputs["input_ids"][:, start:stop], attention_mask=mask[:, :stop],
                    position_ids=place[:, start:stop], past_key_values=cache, use_cache=True,
                )  # fmt: skip
                parts.append(out.logits)
                cache, start = out.past_key_values, stop
            found = torch.cat(parts, 1)
    assert (real(found, longer) - real(logits(model, longer), longer)).abs().max() > 1e-3
    torch.testing.assert_close(real(found, longer), real(expected, longer), atol=2e-5, rtol=2e-5)
