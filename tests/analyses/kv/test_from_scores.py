"""Which selector is made of which scores, and the one ranking of RazorAttention's two kinds of heads."""

import families
import kv_oracle
import pytest
import torch
from transformers import DynamicCache

from interp.analyses.kv.compress_kv import CompressKV
from interp.analyses.kv.duo_attention import DuoAttention, RazorAttention
from interp.analyses.kv.from_scores import OF_SCORES, makeable, razor_ranking, selectors_of
from interp.analyses.kv.head_budgets import HeadKV, TaskKV
from interp.analyses.kv.shares import full_heads
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import RandomKeys, Streaming
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError
from interp.hooks.model.heads import HeadLayout
from interp.menu import MENU

ALWAYS = ["random", "StreamingLLM", "SnapKV", "Task-KV"]


def table(name: str, seed: int, layers: int = 10) -> HeadScores:
    values = torch.rand(2, layers, 6, generator=torch.Generator().manual_seed(seed))
    return HeadScores(name, values, kv_heads=3)


EVERY = {
    name: table(name, seed)
    for seed, name in enumerate(
        ("retrieval", "semantic_retrieval", "retrieval_reasoning", "duo_gates", "razor_induction", "razor_echo")
    )
}


def test_without_scores_four_selectors_stand():
    made = selectors_of({}, seed=7)
    assert list(made) == ALWAYS
    assert made["random"](0.3) == RandomKeys(0.3, seed=7)
    assert [type(made[name](0.2)) for name in ALWAYS] == [RandomKeys, Streaming, SnapKV, TaskKV]


def test_each_selector_takes_its_own_scores():
    made = selectors_of(EVERY)
    assert list(made) == [*ALWAYS, "CompressKV", "HeadKV-R2", "DuoAttention", "RazorAttention"]
    assert made["CompressKV"](0.4) == CompressKV.of(EVERY["semantic_retrieval"], 0.4)
    assert made["HeadKV-R2"](0.4) == HeadKV.of(EVERY["retrieval_reasoning"], 0.4)
    assert made["DuoAttention"](0.4) == DuoAttention.of(EVERY["duo_gates"], 0.4)
    razor = razor_ranking(EVERY["razor_induction"], EVERY["razor_echo"])
    assert made["RazorAttention"](0.4) == RazorAttention.of(razor, 0.4)
    # no two of these tables give the same
    assert made["HeadKV-R2"](0.4) != HeadKV.of(EVERY["retrieval"], 0.4)


def test_headkv_goes_by_retrieval_where_reasoning_is_missing_or_counts_nothing():
    few = {name: EVERY[name] for name in ("retrieval", "razor_echo")}
    made = selectors_of(few)
    assert list(made) == [*ALWAYS, "HeadKV-R"]
    assert made["HeadKV-R"](0.4) == HeadKV.of(EVERY["retrieval"], 0.4)
    nothing = HeadScores("retrieval_reasoning", torch.full((2, 10, 6), torch.nan), kv_heads=3)
    assert list(selectors_of(few | {"retrieval_reasoning": nothing})) == list(made)


def test_the_scores_that_are_named_can_be_measured():
    assert {scores for _, needed in OF_SCORES.values() for scores in needed} <= set(MENU)
    assert makeable(["semantic_retrieval", "sinks"]) == ["CompressKV"]
    assert makeable(["razor_induction"]) == []


def test_a_prefix_of_the_ranking_has_fourteen_heads_by_induction_for_one_by_echo():
    layers, groups = 10, 3
    order = torch.randperm(layers * groups, generator=torch.Generator().manual_seed(3))
    induction, echo = torch.zeros(2, layers * groups).unbind()
    induction[order] = torch.linspace(1, 0, layers * groups)
    # the best by echo are the last by induction
    echo[order.flip(0)] = torch.linspace(1, 0, layers * groups)
    # the second query head of a group has what the first has not
    tables = [
        HeadScores(name, torch.stack([torch.zeros_like(each), each], -1).view(1, layers, 2 * groups), kv_heads=groups)
        for name, each in (("razor_induction", induction), ("razor_echo", echo))
    ]
    ranking = razor_ranking(*tables)
    best = ranking.values.view(layers * groups, 2)
    assert torch.equal(best[:, 0], best[:, 1])
    first = set(best[:, 0].argsort(descending=True, stable=True)[:15].tolist())
    assert first == {*order[:14].tolist(), int(order[-1])}
    # 15 of 30 kv heads, each with its two query heads
    assert len(full_heads(ranking, 0.625, 0.8)) == 30


@pytest.mark.parametrize("name", ["DuoAttention", "RazorAttention", "HeadKV-R2", "CompressKV"])
def test_heads_of_layers_with_a_window_use_up_no_budget(name):
    model = families.make("gemma2")
    layout = HeadLayout.of(model)
    slides = torch.tensor([kind == "sliding_attention" for kind in model.config.layer_types])
    # the best heads stand where keys are dropped
    values = torch.rand(1, layout.layers, layout.heads, generator=torch.Generator().manual_seed(0))
    values = values + torch.where(slides, 0.0, 1.0)[None, :, None]
    tables = {
        each: HeadScores(each, values, kv_heads=layout.kv_heads) for _, needed in OF_SCORES.values() for each in needed
    }
    asked = kv_oracle.prompts(1)
    selector = selectors_of(tables, model=model)[name](0.8)
    later = kv_oracle.continuation()[:1]
    _, noted = kv_oracle.continued(model, selector, asked, later, DynamicCache(config=model.config))
    kept = torch.stack([chosen.kept.float().mean(-1) for chosen in noted.values()])
    assert float(kept.mean()) == pytest.approx(0.8, abs=1 / len(asked[0]))


def test_tables_of_two_models_are_refused():
    with pytest.raises(ScoreError, match="give scores of one model"):
        razor_ranking(table("razor_induction", 0), table("razor_echo", 1, layers=9))
