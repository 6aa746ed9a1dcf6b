"""interp.bridge gives the same values as a bridge made by TransformerLens, and restores the model."""

import importlib.util
from typing import Any

import pytest
import tokenizers_tiny
import torch
from bridges import FAMILIES, FUSED, PATTERN0, QUICK, Z1, close, padded, plain, rescaled, self_only, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from interp.errors import ModelError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.read import keep
from interp.hooks.read.capture import capture
from interp.hooks.transformerlens.bridge import bridge
from interp.testing import families


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_hook_point_of_transformerlens_is_called_with_the_same_value(name):
    model, theirs = families.make(name), plain(name)
    alone = model(tokens(2, 40)).logits
    with bridge(model) as tl:
        idle = tl(tokens(2, 40))
        logits, cache = tl.run_with_cache(tokens(2, 40))
    _, expected = theirs.run_with_cache(tokens(2, 40))
    close(idle, alone) if name in FUSED else torch.testing.assert_close(idle, alone, atol=0, rtol=0)
    close(logits, alone)
    assert set(expected) <= set(cache)
    for site in expected:
        # interp gives -inf where a query cannot attend, TransformerLens the lowest float
        floor = -1e9 if "attn_scores" in site else -torch.inf
        torch.testing.assert_close(cache[site].clamp(floor), expected[site].clamp(floor), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_edits_have_the_same_effect_as_in_transformerlens(name):
    sites = {
        PATTERN0: self_only,
        Z1: rescaled,
        "blocks.0.attn.hook_q": rescaled,
        "blocks.0.attn.hook_attn_scores": lambda x, hook: x * 0.1,
        "blocks.1.attn.hook_rot_q": rescaled,
        "blocks.0.hook_resid_post": lambda x, hook: x.roll(1, 1),
    }
    theirs = plain(name)
    with bridge(families.make(name)) as tl:
        idle = tl(tokens(2, 40))
        for site, edit in sites.items():
            if "rot_q" in site and name in FUSED:
                # TransformerLens defines this point but never calls it
                continue
            edited = tl.run_with_hooks(tokens(2, 40), fwd_hooks=[(site, edit)])
            assert (edited - idle).abs().max() > 1e-4, site
            close(edited, theirs.run_with_hooks(tokens(2, 40), fwd_hooks=[(site, edit)]))
        close(tl.run_with_hooks(tokens(2, 40), fwd_hooks=[]), idle)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_padded_batches(name):
    theirs, real = plain(name), padded()["attention_mask"].bool()
    with bridge(families.make(name)) as tl:
        close(tl(**padded())[real], theirs(**padded())[real])
        edited = tl.run_with_hooks(**padded(), fwd_hooks=[(PATTERN0, lambda p, hook: p * 0.7)])
    close(edited[real], theirs.run_with_hooks(**padded(), fwd_hooks=[(PATTERN0, lambda p, hook: p * 0.7)])[real])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_generation(name):
    model: Any = families.make(name)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(), min_new_tokens=8, **settings)
    lengths = []
    with bridge(model) as tl:
        assert torch.equal(model.generate(tokens(), min_new_tokens=8, **settings), expected)
        with tl.hooks(fwd_hooks=[(Z1, lambda z, hook: lengths.append(z.shape[1])), (PATTERN0, self_only_new)]):
            edited = model.generate(tokens(), min_new_tokens=8, **settings)
        assert lengths == [8] + [1] * 7
        with tl.hooks(fwd_hooks=[(PATTERN0, self_only_new)]):
            again = tl(edited[:, :-1]).argmax(-1)
    assert torch.equal(again[:, 7:], edited[:, 8:])


def self_only_new(pattern, hook):
    """Make head 1 attend to itself, for one query of a cached step or for many."""
    pattern = pattern.clone()
    rows, keys = pattern.shape[-2:]
    pattern[:, 1] = torch.eye(keys)[-rows:]
    return pattern


def anatomy(model):
    """Everything that a bridge could change, in a comparable form that respects the order of entries."""
    parts = {"config": repr(model.config), "implementation": model.config._attn_implementation, "keys": []}
    for name, module in model.named_modules():
        parts[name] = type(module), sorted(vars(module)), [(k, id(v)) for k, v in module._modules.items()]
        parts[name] += tuple(
            [(k, id(v), None if v is None else v.data_ptr()) for k, v in kind.items()]
            for kind in (module._parameters, module._buffers)
        )
        parts[name] += (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
    return parts | {"keys": list(model.state_dict())}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_model_is_restored(name):
    model: Any = families.make(name)
    calls = []
    foreign = model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    before, logits = anatomy(model), model(tokens()).logits
    with bridge(model) as tl:
        assert tl.run_with_cache(tokens())[0].shape == logits.shape
        later = model.get_input_embeddings()._original_component.register_forward_hook(lambda *_: calls.append(2))
    later.remove()
    assert anatomy(model) == before
    with pytest.raises(ZeroDivisionError), bridge(model) as tl:
        tl.run_with_hooks(tokens(), fwd_hooks=[(PATTERN0, lambda p, hook: 1 / 0)])
    assert anatomy(model) == before
    calls.clear()
    assert torch.equal(model(tokens()).logits, logits)
    assert calls == [1]
    # transformers records outputs with its own hooks; none of those added while the bridge was open may remain
    assert len(model(tokens(), output_hidden_states=True).hidden_states) == 3
    foreign.remove()
    with pytest.raises(UsageError, match="closed when its context ended"):
        tl(tokens())


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@torch.no_grad()
@torch.no_grad()
def test_a_model_that_has_recorded_outputs_before_is_restored():
    model = families.make("llama")
    before = model(tokens(1, 12), output_attentions=True, output_hidden_states=True).logits
    modules = [type(module) for module in model.modules()]
    with bridge(model) as tl:
        tl(tokens(1, 12))
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(model(tokens(1, 12)).logits, before)


def test_patterns_are_computed_only_in_hooked_layers():
    ids = tokens(length=400)
    pattern = 4 * 400 * 400
    with bridge(families.make("llama")) as tl:
        with Largest() as idle:
            tl.run_with_cache(ids, names_filter=lambda site: site.endswith(("hook_z", "hook_resid_post")))
        with Largest() as hooked:
            tl.run_with_cache(ids, names_filter=PATTERN0)
    assert idle.numel < pattern / 4 <= hooked.numel


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_capture_on_a_bridge(name):
    model, ids = families.make(name), tokens(2, 40)
    keeps = [keep.entropy(), keep.mass(0, (3, 9)), keep.top_keys(2), keep.columns(), keep.z(), keep.pattern()]
    with capture(model, keeps) as expected:
        model(ids)
    with bridge(model) as tl:
        with capture(tl, keeps) as found:
            tl(ids)
        for item in keeps[:2] + keeps[3:]:
            close(found[item], expected[item])
        assert torch.equal(found[keeps[2]].keys, expected[keeps[2]].keys)

        with capture(tl, keeps, heads="L0H0 L0H1 L1H2") as edited:
            _, cache = tl.run_with_cache(ids)
            seen = torch.stack([cache["pattern", 0][:, 0], cache["pattern", 0][:, 1], cache["pattern", 1][:, 2]], 1)
        close(edited[keep.pattern()], seen)
        with capture(tl, keeps, heads="L0H1") as edited:
            tl.run_with_hooks(ids, fwd_hooks=[(PATTERN0, self_only), ("blocks.0.attn.hook_z", lambda z, hook: z * 0)])
        own = torch.arange(40)
        assert torch.equal(edited[keep.top_keys(2)].keys[0, 0, :, 0], own)
        assert edited[keep.entropy()].abs().max() == 0
        close(edited[keep.mass(0, (3, 9))][0, 0, :, 0], (own == 0).float())
        # z is the input of the output projection, after the edit by TransformerLens
        assert edited[keep.z()].abs().max() == 0


@torch.no_grad()
def test_ablation_on_a_bridge_is_seen_by_its_cache():
    model, ids = families.make("qwen2"), tokens(2, 40)
    with ablate(model, "L1H2", "zero"):
        expected = model(ids).logits
    with bridge(model) as tl, ablate(tl, "L1H2", "zero"):
        logits, cache = tl.run_with_cache(ids, names_filter=Z1)
    close(logits, expected)
    assert cache[Z1][:, :, 2].abs().max() == 0 < cache[Z1][:, :, 1].abs().max()


@torch.no_grad()
def test_contexts_nest_both_ways():
    model, ids = families.make("llama"), tokens(2, 40)
    before = anatomy(model)
    with capture(model, keep.entropy()) as outer, bridge(model) as tl:
        logits = tl(ids)
    assert outer[keep.entropy()].shape == (2, 2, 4, 40)
    assert anatomy(model) == before
    close(logits, model(ids).logits)


@pytest.mark.parametrize("name", QUICK)
def test_a_bridge_made_by_transformerlens_is_refused(name):
    refused = pytest.raises(ModelError, match="computes the attention of 2 of 2 layers itself")
    with refused, capture(plain(name), keep.entropy()):
        pytest.fail("the context must not open")
    with pytest.raises(ModelError, match="already in a TransformerBridge"), bridge(plain(name)):
        pytest.fail("the context must not open")
    plain(name)(tokens())


def test_refusals(monkeypatch):
    model = families.make("llama")
    before = anatomy(model)
    with bridge(model) as tl:
        with pytest.raises(UsageError, match="edit hook_k"):
            tl.run_with_hooks(tokens(), fwd_hooks=[("blocks.0.attn.hook_rot_k", rescaled_keys)])
        with pytest.raises(ModelError, match="already"), bridge(tl):
            pytest.fail("the context must not open")
    unknown = type("UnknownModel", (type(model),), {})
    model.__class__ = unknown
    with pytest.raises(ModelError, match="cannot bridge UnknownModel"), bridge(model):
        pytest.fail("the context must not open")
    model.__class__ = unknown.__mro__[1]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformer_lens" else find(name)
    )
    with pytest.raises(ModelError, match=r"pip install 'transformer-lens>=4\.3,<5'"), bridge(model):
        pytest.fail("the context must not open")
    assert anatomy(model) == before


def rescaled_keys(k, hook):
    return k * 0.5


def test_the_tokenizer_is_not_touched():
    tokenizer = tokenizers_tiny.words()
    with bridge(families.make("llama"), tokenizer) as tl:
        assert tl.tokenizer is not tokenizer
    assert tokenizer.pad_token is None
