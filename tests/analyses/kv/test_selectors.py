"""Selectors against literal masks: which keys are kept, in which layers, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_oracle import SELECTORS, continuation, continued, literal, prompts, scores
from transformers import DynamicCache

from interp.analyses import registry
from interp.analyses.kv.compress_kv import CompressKV
from interp.analyses.kv.full_cache_heads import full_cache_heads
from interp.analyses.kv.head_kv import HeadKV
from interp.analyses.kv.razor_attention import RazorAttention
from interp.analyses.kv.selecting import selecting
from interp.analyses.kv.selector import KeySelector
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import Streaming
from interp.analyses.kv.task_kv import TaskKV
from interp.analyses.results.head_scores import HeadScores
from interp.errors import SpanError, UsageError
from interp.hooks.edit.edit import steering
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "razor"])
def test_later_tokens_see_the_kept_keys_and_no_others(name):
    model: Any = families.make("llama")
    asked, later = prompts(), continuation()
    selector = SELECTORS[name](scores(model))
    logits, noted = continued(model, selector, asked, later, DynamicCache(config=model.config))
    for row in range(2):
        expected = literal(model, selector, asked, row, later, noted)
        torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-4, rtol=0)
    plain, _ = continued(model, Streaming(1.0), asked, later, DynamicCache(config=model.config))
    assert (plain - logits).abs().max() > 1e-3


def test_every_declared_selector_is_in_the_table():
    table = scores(families.make("llama"))
    assert {type(make(table)) for make in SELECTORS.values()} == {e.thing for e in registry.entries("selector")}


@pytest.mark.parametrize("name", SELECTORS)
def test_a_batch_is_its_rows(name):
    model: Any = families.make("llama")
    selector = SELECTORS[name](scores(model))
    asked, later = prompts(), continuation()
    together, noted = continued(model, selector, asked, later, DynamicCache(config=model.config))
    for row in range(2):
        alone, chosen = continued(
            model, selector, asked[row : row + 1], later[row : row + 1], DynamicCache(config=model.config)
        )
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=0)
        for layer, one in chosen.items():
            n = len(asked[row])
            assert one.kept.sum() == noted[layer].kept[row, :, :n].sum()


@pytest.mark.parametrize("name", SELECTORS)
def test_the_share_that_was_asked_for_is_kept(name):
    model: Any = families.make("llama")
    selector = SELECTORS[name](scores(model))
    asked = prompts(1)
    _, noted = continued(model, selector, asked, continuation()[:1], DynamicCache(config=model.config))
    kept = torch.stack([chosen.kept.float().mean(-1) for chosen in noted.values()])
    # each kv head rounds to a whole key
    assert abs(float(kept.mean()) - selector.keep_ratio) < 1 / len(asked[0])
    for chosen in noted.values():
        assert bool(chosen.kept[..., : selector.n_sink].all())
        assert bool(chosen.kept[..., -1].all())


def test_the_dropped_keys_of_razor_stand_as_their_mean_counted_as_often():
    model: Any = families.make("llama")
    asked, later = prompts(1), continuation()[:1, :1]
    selector = RazorAttention(0.4, n_sink=2, n_recent=3)
    logits, noted = continued(model, selector, asked, later, DynamicCache(config=model.config))
    cache = model(**asked.tensors(), use_cache=True).past_key_values
    # literally: mean keys and values appended to the kept ones, log N added to their logits
    made = {}
    for layer, chosen in noted.items():
        keys, values, kept = cache.layers[layer].keys[0], cache.layers[layer].values[0], chosen.kept[0]
        made[layer] = [
            (
                keys[g][kept[g]],
                values[g][kept[g]],
                keys[g][~kept[g]].mean(0),
                values[g][~kept[g]].mean(0),
                (~kept[g]).sum(),
            )
            for g in range(2)
        ]
    from transformers import AttentionInterface

    def razor(module, query, key, value, mask, scaling, **_):
        out = []
        for h in range(query.shape[1]):
            k, v, mean_k, mean_v, count = made[module.layer_idx][h // (query.shape[1] // 2)]
            k = torch.cat([k, mean_k[None], key[0, h // (query.shape[1] // 2), -1:]])
            v = torch.cat([v, mean_v[None], value[0, h // (query.shape[1] // 2), -1:]])
            scores = query[0, h] @ k.T * scaling
            scores[:, -2] += count.log()
            out.append(scores.softmax(-1) @ v)
        return torch.stack(out, 1)[None], None

    AttentionInterface.register("razor_test", razor)
    model.set_attn_implementation("razor_test")
    with torch.no_grad():
        place = torch.tensor([[len(asked[0])]])
        expected = model(input_ids=later, position_ids=place, past_key_values=cache).logits
    model.set_attn_implementation("sdpa")
    AttentionInterface._global_mapping.pop("razor_test")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    without, _ = continued(model, replace(selector, compensate=False), asked, later, DynamicCache(config=model.config))
    assert (without - logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", SELECTORS)
def test_layers_with_a_window_are_left_alone_and_out_of_the_share(name):
    model: Any = families.make("gemma2")
    slides = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert any(slides)
    assert not all(slides)
    asked = prompts(1)
    selector = SELECTORS[name](scores(model))
    _, noted = continued(model, selector, asked, continuation()[:1], DynamicCache(config=model.config))
    assert sorted(noted) == [layer for layer, slid in enumerate(slides) if not slid]
    kept = torch.stack([chosen.kept.float().mean(-1) for chosen in noted.values()])
    assert abs(float(kept.mean()) - selector.keep_ratio) < 1 / len(asked[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["snapkv", "compresskv", "headkv", "taskkv"])
def test_the_rows_that_choose_must_be_read_at_once(name):
    model: Any = families.make("llama")
    asked = prompts(1)
    ids = torch.tensor([asked[0].ids])
    with selecting(model, SELECTORS[name](scores(model)), asked):
        cache = model(ids[:, :-2], use_cache=True).past_key_values
        with pytest.raises(UsageError, match="read it in one prefill"):
            model(ids[:, -2:], past_key_values=cache)
    with selecting(model, Streaming(0.4, n_sink=2, n_recent=3), asked) as state:
        cache = model(ids[:, :-2], use_cache=True).past_key_values
        model(ids[:, -2:], past_key_values=cache)
    assert len(state.memory) == 2


def test_random_keys_differ_from_prompt_to_prompt():
    model: Any = families.make("llama")
    draw = torch.Generator().manual_seed(8)
    chosen = []
    for _ in range(2):
        asked = Prompts.from_ids([torch.randint(5, 60, (41,), generator=draw).tolist()])
        _, noted = continued(
            model, SELECTORS["random"](None), asked, continuation()[:1], DynamicCache(config=model.config)
        )
        chosen.append(torch.stack([noted[layer].kept for layer in sorted(noted)]))
    assert not torch.equal(*chosen)
    # layers and kv heads draw keys of their own
    one, other = chosen[0][:2, 0]
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Streaming(0.0), r"keep_ratio=0.0 is not in \(0, 1\]"),
        (lambda: Streaming(0.5, n_sink=0, n_recent=0), "give numbers of at least 0, one of them above 0"),
        (lambda: SnapKV(0.5, kernel_size=4), "an odd kernel_size"),
        (lambda: TaskKV(0.5, part=1.0), "give a part of the budget in"),
        (
            lambda: selecting(torch.nn.Linear(1, 1), Streaming(0.5), None).__enter__(),
            "a selector needs the prompts that run",
        ),
        (lambda: Streaming(0.5, heads="L0H1"), "name heads that keep everything as full_cache_heads"),
        (lambda: full_cache_heads(HeadScores("x", torch.rand(1, 2, 4)), 0.5, 1.0), "part=1.0 is not in"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def test_selectors_that_do_not_fit_the_model_are_refused():
    model: Any = families.make("llama")
    asked, later = prompts(), continuation()

    def run(selector: KeySelector, given: Prompts = asked) -> None:
        continued(model, selector, given, later, DynamicCache(config=model.config))

    with pytest.raises(UsageError, match="kv heads keep everything"):
        run(Streaming(0.2, full_cache_heads="L0"))
    with pytest.raises(UsageError, match="kv heads keep everything"):
        run(Streaming(0.3, full_cache_heads="all"))
    with pytest.raises(UsageError, match="give \\[layers\\]\\[kv heads\\]"):
        run(HeadKV(0.5, importance=((1.0,),)))
    with pytest.raises(UsageError, match="give one weight for each layer"):
        run(CompressKV(0.5, layer_weights=(1.0,)))


@torch.no_grad()
def test_a_selector_knows_the_prompt_and_razor_its_end():
    model: Any = families.make("llama")
    asked = prompts(1)
    with steering(model, Streaming(0.5)), pytest.raises(SpanError, match="pass that batch"):
        model(torch.tensor([[5, 6, 7]]))
    tokens = torch.tensor([[*asked[0].ids, 7, 8]])
    with selecting(model, RazorAttention(0.5), asked):
        model(**asked.tensors(), use_cache=False)
        with pytest.raises(UsageError, match="to be read before its continuation"):
            model(tokens, use_cache=False)
