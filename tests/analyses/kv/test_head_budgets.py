"""Budgets by scores, by prompt and by layer."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_oracle import continuation, continued, prompts, scores
from transformers import DynamicCache

from interp.analyses.kv._shares import falling, relative
from interp.analyses.kv.compress_kv import CompressKV
from interp.analyses.kv.duo_attention import DuoAttention
from interp.analyses.kv.full_cache_heads import full_cache_heads
from interp.analyses.kv.head_kv import HeadKV
from interp.analyses.kv.layer_errors import layer_errors
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.task_kv import TaskKV
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families


def test_falling_counts_are_what_was_asked_and_fall():
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
    selector = TaskKV(0.6, part=0.5, top=9, n_sink=2, n_recent=3, window=4)
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
@pytest.mark.parametrize(("part", "ratio"), [(0.8, 0.8), (0.7, 0.75), (0.5, 0.9), (0.9, 0.9)])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_the_last_of_several_heads_with_a_full_cache_is_the_nearest(family, part, ratio):
    from interp.analyses import identify

    model: Any = families.make(family)
    asked = prompts()
    selector = TaskKV(ratio, part=part, top=9, n_sink=2, n_recent=3, window=4)
    _, noted = continued(model, selector, asked, continuation(), DynamicCache(config=model.config))
    far = identify.task_kv(model, asked, rows=4, top=9).per_prompt
    layers, heads = far.shape[1:]
    counts = falling(int(part * ratio * layers * heads), layers, heads)
    # some layer has several such heads, and not all
    assert any(2 <= count < heads for count in counts)
    for row, n in enumerate(asked.lengths):
        for layer, count in enumerate(counts):
            order = far[row, layer].argsort(descending=True).tolist()
            full = [*order[: count - 1], order[-1]] if count > 1 else order[:count]
            whole = noted[layer].kept[row].sum(-1) == n
            assert whole.nonzero()[:, 0].tolist() == sorted(full), (row, layer)


@torch.no_grad()
def test_layer_errors_are_what_each_layer_loses_by_itself():
    model: Any = families.make("llama")
    asked = prompts(1)
    selector = SnapKV(0.3, n_sink=2, n_recent=3, window=4)
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
    with pytest.raises(UsageError, match="give a ratio below 1"):
        layer_errors(model, asked, SnapKV(1.0))


def test_a_layer_that_drops_nothing_loses_nothing_and_keeps_its_place():
    model: Any = families.make("llama")
    whole = DuoAttention(0.7, full_cache_heads="L0H0, L0H1, L0H2, L0H3", n_sink=2, n_recent=3)
    assert layer_errors(model, prompts(1), whole, max_new_tokens=1) == (0.0, 1.0)
    # a prompt too short to drop anything of, read before the others
    short = Prompts.from_ids([[5, 6, 7], prompts()[0].ids])
    found = layer_errors(model, short, SnapKV(0.9, n_sink=2, n_recent=3), max_new_tokens=1, batch_size=1)
    assert len(found) == 2
    assert min(found) > 0
    with pytest.raises(UsageError, match="no layer dropped a key"):
        layer_errors(model, short[:1], SnapKV(0.9, n_sink=2, n_recent=3), max_new_tokens=1)


def test_scores_count_by_their_order_and_parts_and_not_by_their_scale():
    table = scores(families.make("llama"))
    small = replace(table, per_prompt=table.per_prompt * 1e-7)
    for one, other in zip(
        HeadKV.from_scores(table, 0.4).importance, HeadKV.from_scores(small, 0.4).importance, strict=True
    ):
        assert one == pytest.approx(other, abs=1e-6)
        assert min(one) > 0


def test_heads_without_a_score_neither_vote_nor_keep_everything():
    values = torch.full((1, 2, 4), torch.nan)
    values[0, 0, 1] = 0.5
    table = HeadScores("made", values, kv_heads=2)
    assert CompressKV.from_scores(table, 0.4).voters == "L0H1"
    assert str(full_cache_heads(table, 0.9, 0.9)) == "L0H0, L0H1"


def test_relative_budgets_have_the_mean_that_was_asked_and_none_above_one():
    weights = torch.tensor([[1.0, 2.0], [3.0, 40.0]])
    for share in (0.1, 0.5, 0.9):
        found = relative(weights, share)
        assert float(found.mean()) == pytest.approx(share, abs=1e-4)
        assert float(found.max()) <= 1
    assert relative(weights, 0.01)[0, 1] == pytest.approx(2 * relative(weights, 0.01)[0, 0])


def test_full_heads_are_whole_kv_heads_within_their_part():
    table = scores(families.make("llama"))
    heads = full_cache_heads(table, 0.8, 0.7)
    groups = {(head.layer, head.head // 2) for head in heads}
    assert len(heads) == 2 * len(groups) == 2 * int(0.8 * 0.7 * table.layers * 2)
    best = table.values.unflatten(1, (2, 2)).amax(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool)
    for layer, group in groups:
        chosen[layer, group] = True
    assert best[chosen].min() >= best[~chosen].max()
    assert not len(full_cache_heads(table, 0.1, 0.1))
