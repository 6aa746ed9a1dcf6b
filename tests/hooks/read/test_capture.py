"""Reading attention on eleven families: unread models are unchanged, reductions equal those of eager patterns."""

from typing import Any

import pytest
import torch
from capture_oracle import KEYS, ROWS, STREAMS, eager_patterns, prompts

from interp.hooks.model.layers import attention_layers
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, run
from interp.testing.families import FAMILIES


def implementations(name):
    """The implementations that the family has: sdpa supports neither soft-cap nor learned sinks."""
    return ["eager"] if name in ("gemma2", "gpt_oss") else ["sdpa", "eager"]


CASES = [(name, how) for name in FAMILIES for how in implementations(name)]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_idle_is_equal_to_the_bit(tiny_model, name, how):
    model = tiny_model(name, attn_implementation=how)
    batch = prompts()
    plain = run(model, batch).logits
    with capture(model, []):
        idle = run(model, batch).logits
    # only one layer is read, for one query, and the model's own attention computes its output
    with capture(model, keep.entropy(), layers=[1], queries=[8]):
        partial = run(model, batch).logits
    assert torch.equal(plain, idle)
    assert torch.equal(plain, partial)
    assert model.config._attn_implementation == how


@pytest.mark.parametrize(("name", "how"), CASES)
def test_reading_is_within_bounds_of_the_models_own(tiny_model, name, how):
    model = tiny_model(name, attn_implementation=how)
    batch = prompts()
    own: dict[int, torch.Tensor] = {}
    ours: dict[int, torch.Tensor] = {}

    def note(into: dict[int, torch.Tensor]):
        def hook(module: torch.nn.Module, given: Any, out: Any) -> None:
            layer: Any = module.layer_idx
            into[layer] = out[0].detach()

        return [module.register_forward_hook(hook) for module in attention_layers(model).values()]

    real = batch.tensors()["attention_mask"].bool()
    hooks = note(own)
    plain = run(model, batch).logits
    for hook in hooks:
        hook.remove()
    hooks = note(ours)
    with capture(model, [keep.entropy(), keep.columns()]):
        read = run(model, batch).logits
    for hook in hooks:
        hook.remove()
    assert (plain - read)[real].abs().max() <= 1e-4
    for layer, out in own.items():
        scale = out[real].abs().max()
        assert (out - ours[layer])[real].abs().max() <= 1e-5 * scale, f"layer {layer}"


@pytest.mark.parametrize("name", FAMILIES)
def test_reductions_equal_those_of_eager_patterns(tiny_model, name):
    # older transformers load Gemma 2 with an sdpa that ignores its soft-cap, and interp then reads it so
    model, batch = tiny_model(name, attn_implementation=implementations(name)[0]), prompts()
    pattern = eager_patterns(model, batch)
    with capture(model, [*ROWS, *KEYS[:2], keep.pattern(), keep.blocks(16)], batch) as cap:
        run(model, batch)
    for b, length in enumerate(batch.lengths):
        p = pattern[b, :, :, -length:, -length:]
        close = {"atol": 1e-5, "rtol": 0}
        rows = (b, slice(None), slice(None), slice(0, length))
        torch.testing.assert_close(cap[keep.pattern()][rows][..., :length], p, **close)
        mass = torch.stack([p[..., 5:9].sum(-1), p[..., 0]], -1)
        torch.testing.assert_close(cap[ROWS[0]][rows], mass, **close)
        over_keys = p / p.sum(-1, keepdim=True)
        torch.testing.assert_close(cap[ROWS[1]][rows], torch.special.entr(over_keys).sum(-1), atol=1e-4, rtol=0)
        best = p.max(-1)
        torch.testing.assert_close(cap[ROWS[3]].probs[rows][..., 0], best.values, **close)
        assert (cap[ROWS[3]].keys[rows][..., 0] == best.indices).float().mean() > 0.999
        before = torch.nn.functional.pad(p.diagonal(-1, -2, -1), (1, 0))
        torch.testing.assert_close(cap[ROWS[4]][rows][..., 0], before, **close)
        torch.testing.assert_close(cap[ROWS[4]][rows][..., 1], p.diagonal(0, -2, -1), **close)
        torch.testing.assert_close(cap[KEYS[1]][b, :, :, :length], p.amax(-2), **close)
        if not getattr(model.config, "sliding_window", None):
            counts = torch.arange(length, 0, -1)
            torch.testing.assert_close(cap[KEYS[0]][b, :, :, :length], p.sum(-2) / counts, **close)
        block = torch.nn.functional.pad(p, (0, -length % 16, 0, -length % 16)).unflatten(-1, (-1, 16)).sum(-1)
        size = torch.full((block.shape[-1],), 16.0)
        size[-1] = length - 16 * (len(size) - 1)
        means = block.unflatten(-2, (-1, 16)).sum(-2) / size[:, None]
        n = block.shape[-1]
        torch.testing.assert_close(cap[keep.blocks(16)][b, :, :, :n, :n], means, **close)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_gives_the_same_as_a_recompute(tiny_model, name, cache):
    model, batch = tiny_model(name), prompts()
    wanted = [*ROWS, *KEYS, *STREAMS, keep.blocks(16)]
    inputs = batch.tensors()
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    if cache == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    plain = model.generate(**inputs, **settings)
    with capture(model, wanted, batch) as cached:
        tokens = model.generate(**inputs, **settings)
    assert torch.equal(plain, tokens)
    width = inputs["input_ids"].shape[1]
    longer = [[*prompt.ids, *row[width:-1].tolist()] for prompt, row in zip(batch, tokens, strict=True)]
    whole = Prompts.from_ids(longer, spans=[dict(prompt.spans) for prompt in batch])
    with capture(model, wanted, whole) as once:
        run(model, whole)
    for item in wanted:
        one, other = cached[item], once[item]
        for a, b in zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]:
            if not a.is_floating_point():
                assert torch.equal(a, b), item
            else:
                torch.testing.assert_close(
                    a, b, atol=1e-4, rtol=1e-4, equal_nan=True, msg=lambda m, i=item: f"{i}: {m}"
                )
    assert cached.lengths == tuple(len(ids) for ids in longer)


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_is_unpadded_and_batch_is_one_by_one(tiny_model, name):
    model, batch = tiny_model(name), prompts((33, 70, 52))
    wanted = [*ROWS, *KEYS, *STREAMS]
    with capture(model, wanted, batch) as together:
        run(model, batch)
    for b in range(len(batch)):
        with capture(model, wanted, batch[b : b + 1]) as alone:
            run(model, batch[b : b + 1])
        for item in wanted:
            one, other = together[item], alone[item]
            for x, y in zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]:
                part = x[b][tuple(slice(0, n) for n in y.shape[1:])]
                if not x.is_floating_point():
                    assert torch.equal(part, y[0]), item
                else:
                    torch.testing.assert_close(part, y[0], atol=1e-4, rtol=1e-4, msg=lambda m, i=item: f"{i}: {m}")
