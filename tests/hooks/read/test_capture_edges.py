"""Edge cases of captures: choices of queries and heads, nesting, masks, gradients, costs, errors and cleaning up."""

import psutil
import pytest
import torch
from capture_oracle import KEYS, ROWS, prompts

from interp.errors import CostError, HeadError, ModelError, SpanError, UsageError
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, model_inputs, run
from interp.testing import families


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
    # queries that the weights do not reach weigh nothing
    short = keep.columns("sum", weights=weights[:, :30])
    with capture(model, short, batch) as cap:
        run(model, batch)
    torch.testing.assert_close(cap[short][0, :, :, :70], 2 * pattern[0, :, :, 20:30, :70].sum(-2))


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
    # two packed documents in one row do not see each other
    assert (cap[keep.pattern()][..., 25:, :25] == 0).all()
    torch.testing.assert_close(cap[keep.pattern()].sum(-1), torch.ones(1, 2, 4, 60))


def test_a_mask_of_four_axes_is_applied(tiny_model):
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
    inputs = model_inputs(model, batch)
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
    # float32, twice: results are copied once when they are joined
    assert dict(cost.parts) == {"entropy()": 2 * 4 * 4 * 8 * 100, "pattern()": 2 * 4 * 4 * 8 * 10_000}
    assert "pattern()" in str(cost)
    huge = Prompts.from_ids([[3] * 2000])
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=200_000_000))
    refused = pytest.raises(CostError, match=r"needs 256\.0 MB for 2,000 tokens and 200\.0 MB is free")
    with refused, capture(model, keep.pattern(), huge):
        run(model, huge)
    # many small steps add up to one large one
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
        ((keep.entropy(),), {"engine": "fast"}, UsageError, "unknown engine"),
    ],
)
def test_arguments_that_cannot_be_read_are_refused(tiny_model, arguments, settings, error, text):
    model, batch = tiny_model("llama"), prompts()
    with pytest.raises(error, match=text), capture(model, list(arguments), batch, **settings):
        run(model, batch)
    assert model.config._attn_implementation == "sdpa"


def test_absent_results_are_refused(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    with capture(model, keep.entropy(), batch) as cap:
        pass
    with pytest.raises(ModelError, match="has nothing for layers"):
        cap[keep.entropy()]
    with pytest.raises(UsageError, match="was not captured"):
        cap[keep.lse()]
    with capture(model, keep.entropy(), batch):
        run(model, batch)
        with pytest.raises(UsageError, match="already holds an earlier run"):
            run(model, batch)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_no_hook_stays_on_the_model(tiny_model, kind):
    from transformers import AttentionInterface, AttentionMaskInterface

    model, batch = tiny_model("gemma3"), prompts()
    names = [set(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    theirs = model.register_forward_hook(lambda *a: None)
    hooks = {id(m): (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}

    class Broken(keep.Entropy):
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
    inputs = model_inputs(model, batch)
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
    refused = pytest.raises(SpanError, match="the running batch has 2 rows, but 3 prompts")
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
def test_chunked_prefill_gives_the_same_as_a_whole_one(tiny_model, name):
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
