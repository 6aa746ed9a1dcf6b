"""Selectors against literal masks, compact caches against hidden keys, budgets, and what is refused."""

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from transformers import DynamicCache

from interp.analyses.keys.applied import selecting
from interp.analyses.keys.base import KeySelector
from interp.analyses.keys.budgets import HeadKV, TaskKV
from interp.analyses.keys.compress import CompressKV
from interp.analyses.keys.duo import DuoAttention, RazorAttention
from interp.analyses.keys.shares import full_heads, relative
from interp.analyses.keys.simple import RandomKeys, Streaming
from interp.analyses.keys.window import SnapKV
from interp.analyses.scores import HeadScores
from interp.hooks.compact import CompactCache, nbytes
from interp.hooks.edit import steering
from interp.hooks.heads import HeadLayout
from interp.hooks.prompts import Prompts
from interp.kernels.errors import SpanError, UsageError

LENGTHS, MORE = (41, 33), 6


def scores(model: Any) -> HeadScores:
    layout = HeadLayout.of(model)
    values = torch.rand(3, layout.layers, layout.heads, generator=torch.Generator().manual_seed(4))
    return HeadScores("made", values, kv_heads=layout.kv_heads)


# each selector of its share, with the few tokens of these prompts
SELECTORS: dict[str, Any] = {
    "streaming": lambda table: Streaming(0.4, sink=2, recent=3),
    "random": lambda table: RandomKeys(0.4, sink=2, recent=3, seed=5),
    "snapkv": lambda table: SnapKV(0.4, sink=2, recent=3, window=4, pool=3),
    "compresskv": lambda table: CompressKV.of(table, 0.4, 2, sink=2, recent=3, window=4),
    "headkv": lambda table: HeadKV.of(table, 0.4, sink=2, recent=3, window=4),
    "taskkv": lambda table: TaskKV(0.6, part=0.5, top=9, sink=2, recent=3, window=4),
    "taskkv of a table": lambda table: TaskKV.of(table, 0.6, 0.5, sink=2, recent=3, window=4),
    "duo": lambda table: DuoAttention.of(table, 0.6, 0.5, sink=2, recent=3),
    "razor": lambda table: RazorAttention.of(table, 0.6, 0.5, sink=2, recent=3),
}


def prompts(rows: int = 2) -> Prompts:
    draw = torch.Generator().manual_seed(1)
    return Prompts.from_ids([torch.randint(5, 60, (n,), generator=draw).tolist() for n in LENGTHS[:rows]])


def continuation() -> torch.Tensor:
    return torch.randint(5, 60, (2, MORE), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def continued(model: Any, selector: KeySelector, asked: Prompts, later: torch.Tensor, cache: Any) -> tuple[Any, Any]:
    """Logits of a continuation read after the prompts, and what was noted, by layer."""
    inputs = asked.tensors()
    mask = inputs["attention_mask"]
    with selecting(model, selector, asked, cache if isinstance(cache, CompactCache) else None) as state:
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        kept = model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).past_key_values
        whole = torch.cat([mask, torch.ones_like(later)], 1)
        place = torch.tensor(asked.lengths)[:, None] + torch.arange(later.shape[1])
        logits = model(input_ids=later, attention_mask=whole, position_ids=place, past_key_values=kept).logits
    return logits, {layer: noted for (_, layer), noted in state.memory.items()}


@torch.no_grad()
def literal(
    model: Any, selector: KeySelector, asked: Prompts, row: int, later: torch.Tensor, noted: Any
) -> torch.Tensor:
    """The same for one row by an eager model, token after token, with each layer's own mask of four axes."""
    ids = torch.tensor([[*asked[row].ids, *later[row].tolist()]])
    n, total = len(asked[row]), ids.shape[1]
    layout = HeadLayout.of(model)
    each = layout.heads // layout.kv_heads
    masks = {}
    for layer, chosen in noted.items():
        seen = torch.ones(total, total).tril().bool().expand(1, layout.heads, -1, -1).clone()
        kept = chosen.kept[row, :, :n].repeat_interleave(each, 0)
        seen[0, :, n:, :n] &= kept[:, None]
        if chosen.window is not None:
            for head, window in enumerate(chosen.window[row].repeat_interleave(each).tolist()):
                for p in range(n, total):
                    seen[0, head, p, selector.sink : max(selector.sink, p - window)] = False
        masks[layer] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    handles = []
    for layer, module in enumerate(block.self_attn for block in model.model.layers):

        def swap(module: Any, args: Any, kwargs: Any, layer: int = layer) -> Any:
            return args, {**kwargs, "attention_mask": masks[layer]}

        handles.append(module.register_forward_pre_hook(swap, with_kwargs=True))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(ids).logits[:, n:]
    finally:
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_compact_cache_gives_the_same_and_holds_what_was_kept(name, family):
    model: Any = families.make(family)
    asked, later = prompts(), continuation()
    selector = SELECTORS[name](scores(model))
    hidden, noted = continued(model, selector, asked, later, DynamicCache(config=model.config))
    cache: Any = CompactCache(model)
    compact, _ = continued(model, selector, asked, later, cache)
    assert torch.equal(hidden, compact)
    for layer, held in enumerate(cache.layers):
        if getattr(held, "is_sliding", False):
            continue
        kept = noted[layer].kept
        assert int(held.kept.sum()) == int(kept.sum())
        size = 2 * held.keys.shape[-1] * 4
        expected = int(kept.sum()) * size + kept.shape[0] * kept.shape[1] * MORE * size + held.kept.numel()
        assert held.nbytes == expected


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
    assert abs(float(kept.mean()) - selector.share) < 1 / len(asked[0])
    for chosen in noted.values():
        assert bool(chosen.kept[..., : selector.sink].all())
        assert bool(chosen.kept[..., -1].all())


def test_snapkv_keeps_what_the_window_attends_to():
    model: Any = families.make("llama")
    asked = prompts(1)
    selector = SnapKV(0.4, sink=1, recent=1, window=5, pool=1)
    _, noted = continued(model, selector, asked, continuation()[:1], DynamicCache(config=model.config))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = model(torch.tensor([asked[0].ids]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    n = len(asked[0])
    for layer, chosen in noted.items():
        rows = patterns[layer][0, :, -5:]
        # a key is averaged over the rows that see it
        seen = torch.ones(n, n).tril()[-5:].sum(0).clamp(min=1)
        votes = (rows.sum(1) / seen).unflatten(0, (2, -1)).mean(1)
        votes[:, 0] = votes[:, -1] = 9.0
        best = votes.topk(round(0.4 * n), dim=-1).indices
        expected = torch.zeros(2, n, dtype=torch.bool).scatter_(1, best, True)
        assert torch.equal(chosen.kept[0], expected)


def test_the_dropped_keys_of_razor_stand_as_their_mean_counted_as_often():
    model: Any = families.make("llama")
    asked, later = prompts(1), continuation()[:1, :1]
    selector = RazorAttention(0.4, sink=2, recent=3)
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
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    without, _ = continued(model, replace(selector, compensate=False), asked, later, DynamicCache(config=model.config))
    assert (without - logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["streaming", "snapkv", "taskkv", "duo"])
def test_generation_is_what_a_recompute_of_every_step_gives(name):
    model: Any = families.make("llama")
    asked = prompts(1)
    selector = SELECTORS[name](scores(model))
    with selecting(model, selector, asked):
        tokens = model.generate(**asked.tensors(), max_new_tokens=MORE, do_sample=False)
        # prompt and reply in one forward: rows of the prompt see all, rows after it what was kept
        logits = model(tokens, use_cache=False).logits
    assert torch.equal(logits[0, len(asked[0]) - 1 : -1].argmax(-1), tokens[0, len(asked[0]) :])


def test_everything_kept_changes_nothing_to_the_bit():
    model: Any = families.make("llama")
    asked, later = prompts(), continuation()
    kept, _ = continued(model, Streaming(1.0), asked, later, DynamicCache(config=model.config))
    inputs = asked.tensors()
    mask = inputs["attention_mask"]
    with torch.no_grad():
        cache = model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=True).past_key_values
        place = torch.tensor(asked.lengths)[:, None] + torch.arange(MORE)
        whole = torch.cat([mask, torch.ones_like(later)], 1)
        plain = model(input_ids=later, attention_mask=whole, position_ids=place, past_key_values=cache).logits
    assert torch.equal(kept, plain)


def test_the_memory_of_a_cache_falls_by_the_share():
    model: Any = families.make("llama")
    asked = Prompts.from_ids([torch.randint(5, 60, (400,), generator=torch.Generator().manual_seed(3)).tolist()])
    sizes = {}
    for share in (1.0, 0.5, 0.1):
        cache: Any = CompactCache(model) if share < 1 else DynamicCache(config=model.config)
        with selecting(model, SnapKV(share), asked, cache if share < 1 else None):
            model.generate(**asked.tensors(), max_new_tokens=2, do_sample=False, past_key_values=cache)
        sizes[share] = nbytes(cache)
    for share in (0.5, 0.1):
        # one byte for each kv head and key says where they were
        assert sizes[share] / sizes[1.0] == pytest.approx(share, abs=0.02)


@torch.no_grad()
def test_the_cache_of_streaming_heads_does_not_grow(monkeypatch):
    from interp.analyses.keys import applied

    monkeypatch.setattr(applied, "EVERY", 4)
    model: Any = families.make("llama")
    asked, new = prompts(), 40
    table = scores(model)
    for selector in (Streaming(0.3, sink=2, recent=3), DuoAttention.of(table, 0.6, 0.5, sink=2, recent=3)):
        inputs = {**asked.tensors(), "max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with selecting(model, selector, asked):
            hidden = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
        cache: Any = CompactCache(model)
        with selecting(model, selector, asked, cache) as state:
            compact = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, past_key_values=cache)
        assert torch.equal(hidden.sequences, compact.sequences)
        assert torch.equal(torch.stack(hidden.logits), torch.stack(compact.logits))
        for layer, held in enumerate(cache.layers):
            window = state.memory[0, layer].window
            most = (selector.sink + window).clamp(max=1000)
            in_rows = held.kept.sum(-1)
            # full heads have every key; the others their window, and what came since the last time
            whole = most == 1000
            lengths = torch.tensor(asked.lengths)[:, None].expand_as(most)
            dense = cache.get_seq_length() - held.kept.shape[-1]
            assert dense < 4
            assert torch.equal(in_rows[whole], (lengths + new - 1 - dense)[whole])
            assert bool((in_rows <= most)[~whole].all())
            assert bool((~whole).any())


def test_falling_counts_are_what_was_asked_and_fall():
    from interp.analyses.keys.shares import falling

    for total, layers, most in ((0, 4, 2), (7, 30, 3), (5, 4, 2), (8, 4, 2), (40, 30, 3)):
        counts = falling(total, layers, most)
        assert sum(counts) == total
        assert max(counts) <= most
        assert counts == sorted(counts, reverse=True)


@torch.no_grad()
def test_task_kv_keeps_the_heads_that_are_far_on_this_prompt():
    from interp.analyses import identify

    model: Any = families.make("llama")
    asked = prompts()
    selector = TaskKV(0.6, part=0.5, top=9, sink=2, recent=3, window=4)
    _, noted = continued(model, selector, asked, continuation(), DynamicCache(config=model.config))
    far = identify.task_kv(model, asked, rows=4, top=9).per_prompt.unflatten(2, (2, -1)).amax(-1)
    whole = torch.stack([noted[layer].kept.sum(-1) for layer in sorted(noted)], 1)
    whole = whole == torch.tensor(asked.lengths)[:, None, None]
    total = int(0.5 * 0.6 * whole[0].numel())
    assert whole.sum((1, 2)).tolist() == [total, total]
    for row in range(2):
        for layer in range(whole.shape[1]):
            if whole[row, layer].sum() == 1:
                assert whole[row, layer].int().argmax() == far[row, layer].argmax()


@torch.no_grad()
def test_layer_errors_are_what_each_layer_loses_by_itself():
    from interp.analyses.keys import layer_errors

    model: Any = families.make("llama")
    asked = prompts(1)
    selector = SnapKV(0.3, sink=2, recent=3, window=4)
    found = layer_errors(model, asked, selector, max_new_tokens=1)
    _, noted = continued(model, selector, asked, continuation()[:1], DynamicCache(config=model.config))
    layout = HeadLayout.of(model)
    each = layout.heads // layout.kv_heads
    tokens = model.generate(**asked.tensors(), max_new_tokens=2, do_sample=False)
    n = len(asked[0])
    values = {}
    handles = [
        block.self_attn.v_proj.register_forward_hook(lambda m, a, out, layer=layer: values.update({layer: out[0]}))
        for layer, block in enumerate(model.model.layers)
    ]
    model.set_attn_implementation("eager")
    patterns = model(tokens[:, : n + 1], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    expected = []
    for layer, block in enumerate(model.model.layers):
        p = patterns[layer][0, :, n]
        v = values[layer].unflatten(-1, (layout.kv_heads, -1)).repeat_interleave(each, 1)
        kept = torch.cat([noted[layer].kept[0], torch.ones(layout.kv_heads, 1).bool()], 1).repeat_interleave(each, 0)
        less = p * kept
        less = less / less.sum(-1, keepdim=True)
        o, other = (block.self_attn.o_proj.weight @ torch.einsum("hk,khd->hd", x, v).flatten() for x in (p, less))
        expected.append((o - other).norm() / o.norm())
    expected = torch.stack(expected)
    torch.testing.assert_close(torch.tensor(found), expected / expected.sum(), atol=1e-5, rtol=0, check_dtype=False)
    assert float(torch.tensor(found).std()) > 1e-3
    with pytest.raises(UsageError, match="drop some keys, write some tokens"):
        layer_errors(model, asked, SnapKV(1.0))


def test_a_layer_that_drops_nothing_loses_nothing_and_keeps_its_place():
    from interp.analyses.keys import layer_errors

    model: Any = families.make("llama")
    whole = DuoAttention(0.7, full="L0H0, L0H1, L0H2, L0H3", sink=2, recent=3)
    assert layer_errors(model, prompts(1), whole, max_new_tokens=1) == (0.0, 1.0)
    # a prompt too short to drop anything of, read before the others
    short = Prompts.from_ids([[5, 6, 7], prompts()[0].ids])
    found = layer_errors(model, short, SnapKV(0.9, sink=2, recent=3), max_new_tokens=1, batch_size=1)
    assert len(found) == 2
    assert min(found) > 0
    with pytest.raises(UsageError, match="no layer dropped a key"):
        layer_errors(model, short[:1], SnapKV(0.9, sink=2, recent=3), max_new_tokens=1)


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
    assert abs(float(kept.mean()) - selector.share) < 1 / len(asked[0])


@torch.no_grad()
def test_several_rows_of_a_prompt_choose_alike_and_beams_are_refused():
    model: Any = families.make("llama")
    asked = prompts()
    inputs = {**asked.tensors(), "max_new_tokens": 4, "num_return_sequences": 2}
    made = {}
    for name in ("hidden", "compact"):
        cache: Any = CompactCache(model) if name == "compact" else None
        torch.manual_seed(3)
        with selecting(model, SnapKV(0.4, sink=2, recent=3, window=4), asked, cache):
            made[name] = model.generate(**inputs, do_sample=True, past_key_values=cache)
    assert torch.equal(made["hidden"], made["compact"])
    with (
        selecting(model, Streaming(0.4), asked, cache := CompactCache(model)),
        pytest.raises(UsageError, match="beams"),
    ):
        model.generate(**inputs, num_beams=2, do_sample=False, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["snapkv", "compresskv", "headkv", "taskkv"])
def test_the_rows_that_choose_must_be_read_at_once(name):
    model: Any = families.make("llama")
    asked = prompts(1)
    ids = torch.tensor([asked[0].ids])
    with selecting(model, SELECTORS[name](scores(model)), asked):
        cache = model(ids[:, :-2], use_cache=True).past_key_values
        with pytest.raises(UsageError, match="let it be read in one prefill"):
            model(ids[:, -2:], past_key_values=cache)
    with selecting(model, Streaming(0.4, sink=2, recent=3), asked) as state:
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


def test_scores_count_by_their_order_and_parts_and_not_by_their_scale():
    table = scores(families.make("llama"))
    small = replace(table, per_prompt=table.per_prompt * 1e-7)
    for one, other in zip(HeadKV.of(table, 0.4).importance, HeadKV.of(small, 0.4).importance, strict=True):
        assert one == pytest.approx(other, abs=1e-6)
        assert min(one) > 0


def test_heads_without_a_score_neither_vote_nor_keep_everything():
    values = torch.full((1, 2, 4), torch.nan)
    values[0, 0, 1] = 0.5
    table = HeadScores("made", values, kv_heads=2)
    assert CompressKV.of(table, 0.4).voters == "L0H1"
    assert str(full_heads(table, 0.9, 0.9)) == "L0H0, L0H1"


def test_relative_budgets_have_the_mean_that_was_asked_and_none_above_one():
    weights = torch.tensor([[1.0, 2.0], [3.0, 40.0]])
    for share in (0.1, 0.5, 0.9):
        found = relative(weights, share)
        assert float(found.mean()) == pytest.approx(share, abs=1e-4)
        assert float(found.max()) <= 1
    assert relative(weights, 0.01)[0, 1] == pytest.approx(2 * relative(weights, 0.01)[0, 0])


def test_full_heads_are_whole_kv_heads_within_their_part():
    table = scores(families.make("llama"))
    heads = full_heads(table, 0.8, 0.7)
    groups = {(head.layer, head.head // 2) for head in heads}
    assert len(heads) == 2 * len(groups) == 2 * int(0.8 * 0.7 * table.layers * 2)
    best = table.values.unflatten(1, (2, 2)).amax(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool)
    for layer, group in groups:
        chosen[layer, group] = True
    assert best[chosen].min() >= best[~chosen].max()
    assert not len(full_heads(table, 0.1, 0.1))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Streaming(0.0), r"share=0.0 is not in \(0, 1\]"),
        (lambda: Streaming(0.5, sink=0, recent=0), "give numbers of 0 or more, one of them above 0"),
        (lambda: SnapKV(0.5, pool=4), "an odd pool"),
        (lambda: TaskKV(0.5, part=1.0), "give a part of the budget in"),
        (
            lambda: selecting(torch.nn.Linear(1, 1), Streaming(0.5), None).__enter__(),
            "a selector needs the prompts that run",
        ),
        (lambda: Streaming(0.5, heads="L0H1"), "name those that keep all as full="),
        (lambda: full_heads(HeadScores("x", torch.rand(1, 2, 4)), 0.5, 1.0), "part=1.0 is not in"),
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
        run(Streaming(0.2, full="L0"))
    with pytest.raises(UsageError, match="kv heads keep everything"):
        run(Streaming(0.3, full="all"))
    with pytest.raises(UsageError, match="give \\[layers\\]\\[kv heads\\]"):
        run(HeadKV(0.5, importance=((1.0,),)))
    with pytest.raises(UsageError, match="give one weight each"):
        run(CompressKV(0.5, layers=(1.0,)))


@torch.no_grad()
def test_a_selector_knows_the_prompt_and_razor_its_end():
    model: Any = families.make("llama")
    asked = prompts(1)
    with steering(model, Streaming(0.5)), pytest.raises(SpanError, match="pass the batch itself"):
        model(torch.tensor([[5, 6, 7]]))
    tokens = torch.tensor([[*asked[0].ids, 7, 8]])
    with selecting(model, RazorAttention(0.5), asked):
        model(**asked.tensors(), use_cache=False)
        with pytest.raises(UsageError, match="to be read before what follows"):
            model(tokens, use_cache=False)


def test_a_compact_cache_is_used_once_and_not_cropped():
    model: Any = families.make("llama")
    cache: Any = CompactCache(model)
    asked = prompts(1)
    with selecting(model, Streaming(0.5), asked, cache), torch.no_grad():
        model(**asked.tensors(), past_key_values=cache)
    with pytest.raises(UsageError, match="cannot be cropped"):
        cache.layers[0].crop(-1)
    with pytest.raises(UsageError, match="name at least the compact ones, and no more"):
        cache.layers[0].compact(cache.layers[0].kept[..., :-1])
