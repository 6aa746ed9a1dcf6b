"""Reading attention on eleven families: idle is equal, reductions are those of eager patterns, caches agree."""

from typing import Any

import families
import psutil
import pytest
import torch
from families import FAMILIES, VOCAB

from interp.hooks import keep
from interp.hooks.capture import capture, placed, run
from interp.hooks.modules import attention_layers
from interp.hooks.prompts import Prompts
from interp.kernels.errors import CostError, HeadError, ModelError, SpanError, UsageError

ROWS = [keep.mass("mark", 0), keep.entropy(), keep.lse(), keep.top_keys(2), keep.at(-1, 0), keep.mass(0, by_value=True)]
KEYS = [keep.columns("mean"), keep.columns("max"), keep.columns("sum", by_value=True)]
STREAMS = [keep.z(), keep.q(), keep.k(), keep.v()]


def prompts(lengths=(70, 90), seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths]
    return Prompts.from_ids(ids, spans=[{"mark": (5, 9)} for _ in lengths])


def eager_patterns(model, batch):
    """[b l h q k] in columns, made by the model's own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**placed(model, batch), output_attentions=True, use_cache=False)
    model.set_attn_implementation(before)
    return torch.stack(out.attentions, 1)


def implementations(name):
    """Those that the family has: sdpa knows neither soft-cap nor learned sinks."""
    return ["eager"] if name in ("gemma2", "gpt_oss") else ["sdpa", "eager"]


CASES = [(name, how) for name in FAMILIES for how in implementations(name)]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_idle_is_equal_to_the_bit(tiny_model, name, how):
    model = tiny_model(name, attn_implementation=how)
    batch = prompts()
    plain = run(model, batch).logits
    with capture(model, []):
        idle = run(model, batch).logits
    # one layer is read, for one query: the rest is idle, and that layer's output is its own
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
def test_reductions_are_those_of_eager_patterns(tiny_model, name):
    # older transformers load Gemma 2 with an sdpa that leaves its soft-cap out, and then we read it so
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
def test_cached_generation_reads_what_a_recompute_reads(tiny_model, name, cache):
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


def test_queries_by_span_and_by_position(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    with capture(model, [keep.entropy()], batch) as whole:
        run(model, batch)
    with capture(model, [keep.entropy(), keep.rows()], batch, queries="mark") as some:
        run(model, batch)
    assert some.queries.tolist() == [[5, 6, 7, 8], [5, 6, 7, 8]]
    torch.testing.assert_close(some[keep.entropy()], whole[keep.entropy()][..., 5:9])
    assert some[keep.rows()].shape == (2, 2, 4, 4, 90)
    with capture(model, keep.entropy(), batch, queries=slice(68, None)) as late:
        run(model, batch)
    assert late.queries[0].tolist() == [68, 69, *[-1] * 20]
    assert late[keep.entropy()][0, ..., 2:].isnan().all()


def test_generated_queries_are_the_rows_that_make_new_tokens(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    with capture(model, keep.top_keys(1), batch, queries="generated") as cap:
        tokens = model.generate(**batch.tensors(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert cap.queries.tolist() == [list(range(n - 1, n + 4)) for n in batch.lengths]
    assert tokens.shape[1] == 95


def test_chosen_heads_come_in_the_order_of_the_set(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    with capture(model, [keep.entropy(), keep.z(), keep.k()], batch) as whole:
        run(model, batch)
    with capture(model, [keep.entropy(), keep.z(), keep.k()], batch, heads="L1H3, L0H1") as some:
        run(model, batch)
    for item, heads in ((keep.entropy(), (1, 3)), (keep.z(), (1, 3)), (keep.k(), (0, 1))):
        expected = torch.stack([whole[item][:, layer, head] for layer, head in enumerate(heads)], 1)
        torch.testing.assert_close(some[item], expected, equal_nan=True)


def test_listed_keys_and_row_weights(tiny_model):
    model, batch = tiny_model("qwen3"), prompts()
    keys = torch.full((2, 90, 2), -1)
    keys[:, 10:, 0] = 3
    weights = torch.zeros(2, 90)
    weights[:, 20:40] = 2.0
    listed, weighted = keep.at(keys=keys), keep.columns("sum", weights=weights)
    with capture(model, [listed, weighted, keep.pattern()], batch) as cap:
        run(model, batch)
    pattern = cap[keep.pattern()]
    torch.testing.assert_close(cap[listed][1, :, :, 10:, 0], pattern[1, :, :, 10:, 3])
    assert (cap[listed][1, ..., 1] == 0).all()
    torch.testing.assert_close(cap[weighted][0, :, :, :70], 2 * pattern[0, :, :, 20:40, :70].sum(-2))


def test_nested_captures_and_two_models(tiny_model):
    one, two, batch = tiny_model("llama"), tiny_model("gpt2"), prompts()
    with capture(one, keep.entropy(), batch) as outer:
        with capture(one, keep.lse(), batch) as inner, capture(two, keep.lse(), batch) as other:
            run(one, batch)
            run(two, batch)
        assert one.config._attn_implementation.startswith("interp")
        assert two.config._attn_implementation == "sdpa"
    assert outer[keep.entropy()].shape == inner[keep.lse()].shape == other[keep.lse()].shape == (2, 2, 4, 90)
    assert one.config._attn_implementation == "sdpa"


def test_static_masks_and_packed_sequences_are_exact(tiny_model):
    model = tiny_model("llama")
    ids = prompts((60,)).tensors()["input_ids"]
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    with torch.no_grad(), capture(model, keep.pattern()) as cap:
        model(ids, position_ids=positions, use_cache=False)
    # two documents in one row do not see each other
    assert (cap[keep.pattern()][..., 25:, :25] == 0).all()
    torch.testing.assert_close(cap[keep.pattern()].sum(-1), torch.ones(1, 2, 4, 60))


def test_a_mask_of_four_axes_is_obeyed(tiny_model):
    model = tiny_model("llama")
    ids = prompts((40,)).tensors()["input_ids"]
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    mask[..., 7] = False
    mask[..., 7, 7] = True
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, use_cache=False).logits
        with capture(model, keep.pattern()) as cap:
            read = model(ids, attention_mask=mask, use_cache=False).logits
    assert (cap[keep.pattern()][..., 8:, 7] == 0).all()
    torch.testing.assert_close(plain, read, atol=1e-4, rtol=0)


def test_gradients_flow_while_reading(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    inputs = placed(model, batch)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    grads = []
    for context in (None, capture(model, [keep.entropy(), keep.columns()])):
        x = embedded.clone().requires_grad_()
        if context is None:
            model(inputs_embeds=x, **inputs).logits.square().mean().backward()
        else:
            with context:
                model(inputs_embeds=x, **inputs).logits.square().mean().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_cost_is_printed_and_refused(tiny_model, monkeypatch):
    model, batch = tiny_model("llama"), prompts()
    cost = capture(model, [keep.entropy(), keep.pattern()]).cost(4, 100)
    # float32, twice: results are copied once when they are put together
    assert dict(cost.parts) == {"entropy()": 2 * 4 * 4 * 8 * 100, "pattern()": 2 * 4 * 4 * 8 * 10_000}
    assert "pattern()" in str(cost)
    huge = Prompts.from_ids([[3] * 2000])
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=200_000_000))
    refused = pytest.raises(CostError, match=r"needs 256\.0 MB for 2,000 tokens and 200\.0 MB is free")
    with refused, capture(model, keep.pattern(), huge):
        run(model, huge)
    # many small steps come to as much as one large one
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=300_000))
    with pytest.raises(CostError, match="is free"), capture(model, keep.rows(), batch, queries="generated"):
        model.generate(**batch.tensors(), max_new_tokens=60, min_new_tokens=60, do_sample=False)
    monkeypatch.undo()
    assert model.config._attn_implementation == "sdpa"
    assert run(model, batch) is not None


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "text"),
    [
        ((keep.mass("nowhere"),), {}, SpanError, 'prompt 0 has no span "nowhere"'),
        ((keep.entropy(),), {"layers": [7]}, HeadError, "layer 7 of a 2-layer model"),
        ((keep.entropy(),), {"heads": "L0H9"}, HeadError, "L0H9"),
        (("entropy",), {}, UsageError, "not something to keep"),
        ((keep.entropy(),), {"queries": [-1]}, UsageError, "negative position"),
        ((keep.entropy(),), {"engine": "fast"}, UsageError, "does not exist"),
    ],
)
def test_what_cannot_be_read_says_so(tiny_model, arguments, settings, error, text):
    model, batch = tiny_model("llama"), prompts()
    with pytest.raises(error, match=text), capture(model, list(arguments), batch, **settings):
        run(model, batch)
    assert model.config._attn_implementation == "sdpa"


def test_results_that_are_not_there(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    with capture(model, keep.entropy(), batch) as cap:
        pass
    with pytest.raises(ModelError, match="has nothing for layers"):
        cap[keep.entropy()]
    with pytest.raises(UsageError, match="was not captured"):
        cap[keep.lse()]
    with capture(model, keep.entropy(), batch):
        run(model, batch)
        with pytest.raises(UsageError, match="already holds a run"):
            run(model, batch)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_nothing_of_ours_stays(tiny_model, kind):
    from transformers import AttentionInterface, AttentionMaskInterface

    model, batch = tiny_model("gemma3"), prompts()
    names = [set(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    theirs = model.register_forward_hook(lambda *a: None)
    hooks = {id(m): (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}

    class Broken(keep.entropy):
        def request(self, site, queries, spans):
            if site.layer == 1:
                raise kind("stopped")
            return super().request(site, queries, spans)

    with pytest.raises(kind, match="stopped"), capture(model, [Broken(), keep.z()], batch):
        run(model, batch)
    assert names == [set(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
    assert hooks == {id(m): (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}
    assert attributes == {id(m): set(vars(m)) for m in model.modules()}
    assert model.config._attn_implementation == "sdpa"
    theirs.remove()


def test_models_that_share_a_config_do_not_see_each_other(tiny_model):
    from transformers import LlamaForCausalLM

    config = tiny_model("llama").config
    one, two, batch = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval(), prompts()
    plain = run(two, batch).logits
    with capture(one, keep.entropy(), batch) as cap:
        assert torch.equal(run(two, batch).logits, plain)
        run(one, batch)
        with capture(two, keep.entropy(), batch) as other:
            run(two, batch)
    assert not torch.equal(cap[keep.entropy()].nan_to_num(), other[keep.entropy()].nan_to_num())
    outer, inner = capture(one, keep.entropy(), batch), capture(two, keep.entropy(), batch)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    run(two, batch)
    inner.__exit__(None, None, None)
    assert config._attn_implementation == "sdpa"
    assert torch.equal(run(two, batch).logits, plain)


def test_gradients_into_values_alone(tiny_model):
    model = families.make("llama")
    batch = Prompts.from_ids([(torch.arange(1500) % 100 + 3).tolist()])
    model.requires_grad_(False)
    weight = model.model.layers[0].self_attn.v_proj.weight.requires_grad_()
    inputs = placed(model, batch)
    grads = []
    for kept in ([], [keep.entropy()]):
        with capture(model, kept):
            model(**inputs).logits.square().mean().backward()
        grads.append(weight.grad)
        weight.grad = None
    assert torch.equal(*grads)


def test_a_batch_that_is_not_the_prompts_is_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(SpanError, match="rows of"), capture(model, keep.mass("mark"), prompts((25,))):
        run(model, prompts((40, 40)))
    refused = pytest.raises(SpanError, match="a batch of 2 rows runs and 3 prompts")
    with refused, capture(model, keep.mass("mark"), prompts((25, 30, 35))):
        run(model, prompts((20, 20)))


def test_several_returned_sequences_have_the_spans_of_their_prompt(tiny_model):
    model, batch = tiny_model("llama"), prompts((20, 30))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": True, "num_return_sequences": 3}
    with capture(model, keep.mass("mark"), batch) as cap:
        model.generate(**batch.tensors(), **settings)
    mass = cap[keep.mass("mark")]
    assert mass.shape == (6, 2, 4, 33, 1)
    torch.testing.assert_close(mass[0, ..., :20, :], mass[2, ..., :20, :])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunked_prefill_reads_what_a_whole_one_reads(tiny_model, name):
    model, batch = tiny_model(name), prompts()
    wanted = [*ROWS, *KEYS, keep.blocks(16)]
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    found = []
    for more in ({}, {"prefill_chunk_size": 33}):
        with capture(model, wanted, batch) as cap:
            model.generate(**batch.tensors(), **settings, **more)
        found.append(cap)
    for item in wanted:
        pair = [cap[item] for cap in found]
        for a, b in zip(*pair, strict=True) if isinstance(pair[0], tuple) else [pair]:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, equal_nan=True, msg=lambda m, i=item: f"{i}: {m}")


def test_a_mask_of_four_axes_with_a_static_cache_is_refused(tiny_model):
    from transformers import StaticCache

    model = tiny_model("llama")
    ids = prompts((20,)).tensors()["input_ids"]
    mask = torch.zeros(1, 1, 20, 40, dtype=torch.bool)
    mask[..., :20] = torch.ones(20, 20, dtype=torch.bool).tril()
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad(), pytest.raises(ModelError, match="static cache"), capture(model, keep.entropy()):
        model(ids, attention_mask=mask, past_key_values=cache)
