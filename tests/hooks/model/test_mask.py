"""Models whose layers compute with the attention mask, in place of passing it on."""

import copy
import operator
import types
from typing import Any

import pytest
import torch
from transformers import DogeConfig, DogeForCausalLM

import interp
from interp import keep
from interp.errors import ModelError
from interp.hooks.model.mask import MaskFacts
from interp.testing import families

PROMPTS = interp.Prompts.from_ids([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15]])


def hidden(mask, where):
    """The mask, which also hides the keys at some places, in either form."""
    return mask & ~where if mask.dtype == torch.bool else mask.masked_fill(where, torch.finfo(mask.dtype).min)


def third_key(mask):
    where = torch.zeros(mask.shape[-2:], dtype=torch.bool)
    where[4:, 2] = True
    return hidden(mask, where)


def by_head(mask):
    """Another mask for each of the four heads; the last one does not see the position itself."""
    whole = mask.repeat(1, 4, 1, 1)
    where = torch.zeros(whole.shape, dtype=torch.bool)
    where[:, 3] = torch.eye(mask.shape[-1], dtype=torch.bool)[-mask.shape[-2] :]
    where[..., :4, :] = False
    return hidden(whole, where)


COMPUTED = {
    "a slice of all keys": lambda mask: mask[:, :, :, : mask.shape[-1]],
    "a copy": lambda mask: mask.clone(),
    "another key hidden": third_key,
    "a mask for each head": by_head,
    "a choice by where": lambda mask: torch.where(torch.ones(1, dtype=torch.bool), mask, mask),
    "changed in place": lambda mask: mask.clone().mul_(True),
    "two steps": lambda mask: third_key(mask.expand(-1, -1, -1, -1)).contiguous(),
    "stacked and taken apart": lambda mask: torch.stack([mask, mask])[0],
    "asked first": lambda mask: mask.clone() if bool((mask == mask).all()) else None,
}


def with_mask(compute, implementation="sdpa"):
    """A model whose layers change the mask before they attend."""
    torch.manual_seed(0)
    model = families.make("llama")
    model.set_attn_implementation(implementation)
    for layer in model.model.layers:
        original = type(layer.self_attn).forward

        def forward(self, hidden_states, *args, attention_mask=None, original=original, **kwargs):
            mask = None if attention_mask is None else compute(attention_mask)
            return original(self, hidden_states, *args, attention_mask=mask, **kwargs)

        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)
    return model


def unpadded(rows):
    """Patterns [b l h q k] of left-padded rows, indexed by position."""
    n = max(PROMPTS.lengths)
    found = torch.full((len(rows), rows.shape[1], rows.shape[2], n, n), float("nan"))
    for row, length in enumerate(PROMPTS.lengths):
        found[row, :, :, :length, :length] = rows[row, :, :, n - length :, n - length :]
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", COMPUTED)
def test_a_computed_mask_is_read_as_the_model_uses_it(case, implementation):
    eager = with_mask(COMPUTED[case], "eager")
    with torch.no_grad():
        right = eager(**PROMPTS.tensors(), output_attentions=True)
    expected = unpadded(torch.stack(right.attentions, 1))
    model = with_mask(COMPUTED[case], implementation)
    share = keep.mass((0, 2))
    with torch.no_grad(), interp.capture(model, [keep.pattern(), share], PROMPTS) as cap:
        logits = model(**PROMPTS.tensors()).logits
    live = PROMPTS.tensors()["attention_mask"].bool()
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(logits[live], right.logits[live], atol=1e-5, rtol=1e-4)
    for row, length in enumerate(PROMPTS.lengths):
        part = (row, slice(None), slice(None), slice(length))
        seen = cap[keep.pattern()][part][..., :length]
        torch.testing.assert_close(seen, expected[part][..., :length], atol=1e-5, rtol=1e-4)
        mass = expected[part][..., :2].sum(-1)
        torch.testing.assert_close(cap[share][part][..., 0], mass, atol=1e-5, rtol=1e-4)


def test_a_family_with_a_dynamic_mask_is_right():
    """Doge adds a bias of each key to the mask; of more keys than its window holds it hides the least."""
    torch.manual_seed(0)
    config = DogeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None, bos_token_id=None, pad_token_id=0,
        keep_window_size=4,
    )  # fmt: skip
    model = DogeForCausalLM(config).eval()
    layers: Any = model.model.layers
    for layer in layers:
        torch.nn.init.normal_(layer.self_attn.A)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        right = eager(**PROMPTS.tensors(), output_attentions=True)
        with interp.capture(model, keep.pattern(), PROMPTS) as cap:
            logits = model(**PROMPTS.tensors()).logits
    live = PROMPTS.tensors()["attention_mask"].bool()
    torch.testing.assert_close(logits[live], right.logits[live], atol=1e-5, rtol=1e-4)
    expected = unpadded(torch.stack(right.attentions, 1))
    for row, length in enumerate(PROMPTS.lengths):
        part = (row, slice(None), slice(None), slice(length), slice(length))
        torch.testing.assert_close(cap[keep.pattern()][part], expected[part], atol=1e-5, rtol=1e-4)


def test_nothing_is_computed_where_the_mask_is_passed_on():
    """A long mask is never made, and its shape, dtype and device are known."""
    seen = []

    def look(mask):
        seen.append((type(mask).__name__, tuple(mask.shape), mask.dim(), mask.dtype, mask.device.type, mask.size(-1)))
        return mask

    model = with_mask(look)
    with torch.no_grad(), interp.capture(model, keep.entropy(), PROMPTS):
        model(**PROMPTS.tensors())
    assert set(seen) == {("DeferredMask", (2, 1, 7, 7), 4, torch.bool, "cpu", 7)}


def zero(mask):
    mask[..., 0] = 0
    return mask


IN_PLACE = {
    "a method": lambda mask: mask.mul_(1),
    "an operator": lambda mask: operator.imul(mask, 1),
    "a part": zero,
    "the target of a function": lambda mask: (torch.logical_not(mask, out=mask), mask)[1],
    "the result is dropped": lambda mask: (mask.masked_fill_(mask == 0, 0), mask)[1],
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_a_mask_changed_in_place_is_refused(case):
    """The layers share the mask, so that a change of the placeholder would be lost."""
    model = with_mask(IN_PLACE[case])
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match="changes its attention mask in place"),
        interp.capture(model, keep.entropy(), PROMPTS),
    ):
        model(**PROMPTS.tensors())


def test_a_mask_of_another_kind_is_refused():
    facts = MaskFacts("flex_attention", {"batch_size": 1, "q_length": 2, "kv_length": 2})
    with pytest.raises(ModelError, match="cannot make for 'flex_attention'"):
        facts.whole(torch.device("cpu"))
