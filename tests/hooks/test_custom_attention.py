"""Attention functions registered by a user: right where they are attention, and refused where they are not."""

import contextlib

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import interp
from interp import keep
from interp.analyses import steer
from interp.errors import ModelError
from interp.testing import families


def plain(*args, **kw):
    return sdpa_attention_forward(*args, **kw)


def gated(*args, **kw):
    out, weights = sdpa_attention_forward(*args, **kw)
    return 1.5 * out, weights


def sharpened(module, query, key, value, mask, **kw):
    return sdpa_attention_forward(module, 2 * query, key, value, mask, **kw)


def without_first_key(module, query, key, value, mask, **kw):
    hidden = value.clone()
    hidden[:, :, 0] = 0
    return sdpa_attention_forward(module, query, key, hidden, mask, **kw)


def head_order_reversed(*args, **kw):
    out, weights = sdpa_attention_forward(*args, **kw)
    return out.flip(2), weights


def not_a_number(*args, **kw):
    out, weights = sdpa_attention_forward(*args, **kw)
    return out * float("nan"), weights


OTHER = [gated, sharpened, without_first_key, head_order_reversed, not_a_number]
PROMPTS = interp.Prompts.from_ids([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]])


@contextlib.contextmanager
def registered(function, family="llama", name="custom"):
    """A model that attends by a function, which may be registered under a name of transformers."""
    model = families.make(family)
    interfaces = {AttentionInterface: function, AttentionMaskInterface: sdpa_mask}
    before = {interface: interface._global_mapping.get(name) for interface in interfaces}
    for interface, made in interfaces.items():
        interface.register(name, made)
    try:
        model.set_attn_implementation(name)
        yield model
    finally:
        for interface, original in before.items():
            if original is None:
                interface._global_mapping.pop(name, None)
            else:
                interface.register(name, original)


USES = {
    "read": lambda model: interp.capture(model, keep.entropy(), PROMPTS),
    "read the pattern": lambda model: interp.capture(model, keep.pattern(), PROMPTS),
    "edit": lambda model: interp.steering(model, steer.Pasta([(0, 2)] * 2, heads=[(0, 0)]), PROMPTS),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("function", OTHER)
def test_what_is_not_softmax_attention_is_refused(function, use):
    with (
        registered(function) as model,
        torch.no_grad(),
        pytest.raises(ModelError, match="'custom' of LlamaAttention does not compute the softmax attention"),
        USES[use](model),
    ):
        model(**PROMPTS.tensors())


@pytest.mark.parametrize("name", ["sdpa", "sdpa_gated", "flex_attention"])
def test_the_function_decides_and_not_its_name(name):
    with (
        registered(gated, name=name) as model,
        torch.no_grad(),
        pytest.raises(ModelError, match=f"{name!r} of LlamaAttention does not compute the softmax attention"),
        interp.capture(model, keep.entropy(), PROMPTS),
    ):
        model(**PROMPTS.tensors())


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_attention_under_another_name_is_used_like_sdpa(family, use):
    model = families.make(family)
    model.set_attn_implementation("sdpa" if family != "gemma2" else "eager")
    with torch.no_grad(), USES[use](model) as right:
        expected = model(**PROMPTS.tensors()).logits
    with (
        registered(plain if family != "gemma2" else soft_capped, family) as model,
        torch.no_grad(),
        USES[use](model) as cap,
    ):
        found = model(**PROMPTS.tensors()).logits
    live = PROMPTS.tensors()["attention_mask"].bool()
    torch.testing.assert_close(found[live], expected[live], atol=1e-5, rtol=1e-4)
    if use == "read":
        torch.testing.assert_close(cap[keep.entropy()], right[keep.entropy()], atol=1e-5, rtol=1e-4, equal_nan=True)


def soft_capped(module, query, key, value, mask, scaling=None, softcap=None, **kw):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = query @ key.transpose(-1, -2) * scaling
    logits = softcap * (logits / softcap).tanh()
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num()
    return (weights @ value).transpose(1, 2), None


@pytest.mark.parametrize("function", OTHER)
def test_ablation_reads_nothing_and_works(function):
    """Heads are cut at the output projection, so that it does not matter how they attended."""
    with registered(function) as model, torch.no_grad():
        projection, d = model.model.layers[1].self_attn.o_proj, model.config.head_dim
        hook = projection.register_forward_pre_hook(
            lambda _, args: (torch.cat([args[0][..., :d] * 0, args[0][..., d:]], -1),)
        )
        expected = model(**PROMPTS.tensors()).logits
        hook.remove()
        with interp.ablate(model, [(1, 0)], kind="zero"):
            found = model(**PROMPTS.tensors()).logits
        torch.testing.assert_close(found, expected, equal_nan=True)
