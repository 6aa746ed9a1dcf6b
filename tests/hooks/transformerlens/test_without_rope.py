"""Attention without rotation: the captured values, the unchanged output of the model, and the errors."""

import pytest
import torch
from capture_oracle import prompts

from interp import steer
from interp.errors import ModelError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.edit.edit import steering
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, run
from interp.hooks.transformerlens.bridge import bridge
from interp.hooks.transformerlens.without_rope import without_rope
from interp.testing import families


def projected(model, batch):
    """q [l h q d] and k [l g q d] of one prompt, read from the projections and norms of the attention modules."""
    found = {}
    handles = []
    for layer in model.model.layers:
        attention = layer.self_attn
        for letter in "qk":
            name = f"{letter}_norm" if hasattr(attention, f"{letter}_norm") else f"{letter}_proj"
            see = lambda _, args, out, letter=letter: found.setdefault(letter, []).append(out)  # noqa: E731
            handles.append(getattr(attention, name).register_forward_hook(see))
    run(model, batch)
    for handle in handles:
        handle.remove()
    made = []
    for letter in "qk":
        flat = [out[0].flatten(1) if out.dim() == 4 else out[0] for out in found[letter]]
        made.append(torch.stack(flat).unflatten(-1, (-1, 16)).transpose(1, 2))
    return made


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "olmo2"])
def test_queries_and_keys_are_those_of_the_projections(tiny_model, name):
    model, batch = tiny_model(name), prompts((33,))
    q, k = projected(model, batch)
    with without_rope(model), capture(model, [keep.q(), keep.k()], batch) as cap:
        run(model, batch)
    torch.testing.assert_close(cap[keep.q()][0], q, atol=1e-6, rtol=0)
    torch.testing.assert_close(cap[keep.k()][0], k, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", families.CONFIGS)
def test_the_output_of_every_family_is_unchanged(tiny_model, name):
    model, batch = tiny_model(name), prompts((40, 31))
    before, hooks = model.config._attn_implementation, hooked(model)
    with torch.no_grad():
        plain = run(model, batch).logits
    with capture(model, [keep.q(), keep.pattern()], batch) as rotated:
        run(model, batch)
    with without_rope(model), capture(model, [keep.q(), keep.pattern()], batch) as cap:
        assert torch.equal(run(model, batch).logits, plain)
    assert (model.config._attn_implementation, hooked(model)) == (before, hooks)
    # the rotation of the first real token is the identity
    torch.testing.assert_close(cap[keep.q()][..., 0, :], rotated[keep.q()][..., 0, :], atol=1e-6, rtol=0)
    same = torch.equal(cap[keep.pattern()].nan_to_num(), rotated[keep.pattern()].nan_to_num())
    assert same == (name == "gpt2")
    live = cap[keep.pattern()][0].sum(-1)
    if name != "gpt_oss":
        torch.testing.assert_close(live, torch.ones_like(live), atol=1e-5, rtol=0)


def test_pattern_is_the_softmax_of_content(tiny_model):
    model, batch = tiny_model("llama"), prompts((33,))
    q, k = projected(model, batch)
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    expected = scores.masked_fill(torch.ones(33, 33).triu(1).bool(), -torch.inf).softmax(-1)
    with without_rope(model), capture(model, keep.pattern(), batch) as cap:
        run(model, batch)
    torch.testing.assert_close(cap[keep.pattern()][0], expected, atol=1e-5, rtol=0)


def test_the_same_through_a_bridge():
    pytest.importorskip("transformer_lens")
    for name in ("qwen3", "gpt_neox"):
        model, batch = families.make(name), prompts((21,))
        with without_rope(model), capture(model, [keep.q(), keep.k()], batch) as cap:
            run(model, batch)
        with bridge(model) as tl, without_rope(tl), capture(tl, [keep.q(), keep.k()], batch) as other:
            run(tl, batch)
        for item in (keep.q(), keep.k()):
            torch.testing.assert_close(other[item], cap[item], atol=1e-5, rtol=0)


def test_errors_leave_nothing_on_the_model(tiny_model, monkeypatch):
    model, batch = tiny_model("llama"), prompts((20,))
    before = hooked(model)
    with (
        pytest.raises(UsageError, match="without a cache; pass use_cache=False"),
        without_rope(model),
        capture(model, keep.q(), batch),
    ):
        model.generate(**batch.tensors(), max_new_tokens=2, do_sample=False)
    with (
        pytest.raises(UsageError, match="z cannot be read without rotation"),
        without_rope(model),
        capture(model, keep.z(), batch),
    ):
        run(model, batch)
    complex_valued = lambda self, x, position_ids, **_: torch.ones(1, x.shape[1], 8, dtype=torch.complex64)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.rotary_emb), "forward", complex_valued)
        with (
            pytest.raises(ModelError, match="does not receive its rotation"),
            without_rope(model),
            capture(model, keep.q(), batch),
        ):
            run(model, batch)
    assert (model.config._attn_implementation, hooked(model)) == ("sdpa", before)
    with capture(model, keep.q(), batch) as cap:
        run(model, batch)
    assert cap[keep.q()].shape == (1, 2, 4, 20, 16)


def hooked(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("edit", [steer.Boost((3, 9), 20.0), steer.Temperature(3.0, heads="L0H1 L1H2"), None])
def test_edits_act_on_layers_that_are_read_without_rotation(tiny_model, edit):
    """The output of the model is that under the edit alone."""
    model, batch = tiny_model("llama"), prompts((33, 20))

    def edited():
        return ablate(model, "L0H1 L1H2", "uniform") if edit is None else steering(model, edit, batch)

    with torch.no_grad():
        plain = run(model, batch).logits
        with edited():
            alone = run(model, batch).logits
        with edited(), without_rope(model), capture(model, keep.pattern(), batch):
            read = run(model, batch).logits
    assert not torch.allclose(alone, plain, atol=1e-4)
    torch.testing.assert_close(read, alone, atol=1e-5, rtol=0)
