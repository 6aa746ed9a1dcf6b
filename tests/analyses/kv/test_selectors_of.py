"""Which selector is made of which scores, and the one ranking of RazorAttention's two kinds of heads."""

from dataclasses import replace

import kv_oracle
import pytest
import torch
from transformers import DynamicCache

from interp.analyses import registry
from interp.analyses.kv.compress_kv import CompressKV
from interp.analyses.kv.duo_attention import DuoAttention
from interp.analyses.kv.full_cache_heads import full_cache_heads
from interp.analyses.kv.head_kv import HeadKV
from interp.analyses.kv.random_keys import RandomKeys
from interp.analyses.kv.razor_attention import RazorAttention, razor_ranking
from interp.analyses.kv.selectors_of import selectors_of
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import Streaming
from interp.analyses.kv.task_kv import TaskKV
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError, UsageError
from interp.hooks.model.heads import HeadLayout
from interp.testing import families

ALWAYS = ["random", "streaming", "snapkv", "task_kv"]


def table(name: str, seed: int, layers: int = 10) -> HeadScores:
    values = torch.rand(2, layers, 6, generator=torch.Generator().manual_seed(seed))
    return HeadScores(name, values, kv_heads=3)


EVERY = {
    name: table(name, seed)
    for seed, name in enumerate(
        ("retrieval", "semantic_retrieval", "retrieval_reasoning", "duo_gates", "razor_induction", "razor_echo")
    )
}


def test_names_agree_with_files():
    for entry in registry.entries("selector"):
        assert entry.thing.__module__ == f"interp.analyses.kv.{entry.name}"
        assert entry.title
        assert entry.source
    assert [entry.name for entry in registry.entries("selector") if entry.baseline] == ["random_keys"]


def test_without_scores_four_selectors_are_made():
    made = selectors_of({}, seed=7)
    assert list(made) == ALWAYS
    assert made["random"](0.3) == RandomKeys(0.3, seed=7)
    assert [type(made[name](0.2)) for name in ALWAYS] == [RandomKeys, Streaming, SnapKV, TaskKV]


def test_selectors_that_choose_heads_have_a_baseline_by_depth():
    made = selectors_of(EVERY, depth=True)
    pairs = ["compress_kv", "head_kv", "duo_attention", "razor_attention"]
    assert list(made) == [*ALWAYS, *(name for pair in pairs for name in (pair, f"{pair} by depth"))]
    profile = replace(EVERY["duo_gates"].depth_profile(), name="duo_gates")
    assert made["duo_attention by depth"](0.4) == DuoAttention.from_scores(profile, 0.4)
    assert made["duo_attention by depth"](0.4) != made["duo_attention"](0.4)


def test_each_selector_takes_its_own_scores():
    made = selectors_of(EVERY)
    assert list(made) == [*ALWAYS, "compress_kv", "head_kv", "duo_attention", "razor_attention"]
    assert made["compress_kv"](0.4) == CompressKV.from_scores(EVERY["semantic_retrieval"], 0.4)
    assert made["head_kv"](0.4) == HeadKV.from_scores(EVERY["retrieval_reasoning"], 0.4)
    assert made["duo_attention"](0.4) == DuoAttention.from_scores(EVERY["duo_gates"], 0.4)
    razor = razor_ranking(EVERY["razor_induction"], EVERY["razor_echo"])
    assert made["razor_attention"](0.4) == RazorAttention.from_scores(razor, 0.4)
    # no two of these tables give the same
    assert made["head_kv"](0.4) != HeadKV.from_scores(EVERY["retrieval"], 0.4)


def test_headkv_goes_by_retrieval_where_reasoning_is_missing_or_counts_nothing():
    few = {name: EVERY[name] for name in ("retrieval", "razor_echo")}
    made = selectors_of(few)
    assert list(made) == [*ALWAYS, "head_kv"]
    assert made["head_kv"](0.4) == HeadKV.from_scores(EVERY["retrieval"], 0.4)
    nothing = HeadScores("retrieval_reasoning", torch.full((2, 10, 6), torch.nan), kv_heads=3)
    assert list(selectors_of(few | {"retrieval_reasoning": nothing})) == list(made)


def test_selectors_may_be_named_and_set():
    settings = {
        "snapkv": {"window": 5, "n_sink": 2},
        "duo-attention": {"part": 0.3, "n_recent": 3},
        "random_keys": {"seed": 4},
        "razor_attention": {"compensate": False},
        "compress_kv": {"n_voters": 1, "layer_weights": [1.0] * 10},
    }
    names = ("DuoAttention", "snapkv", "razor_attention", "compress_kv")
    made = selectors_of(EVERY, seed=7, names=names, settings=settings)
    assert list(made) == ["random", "snapkv", "compress_kv", "duo_attention", "razor_attention"]
    assert made["snapkv"](0.4) == SnapKV(0.4, window=5, n_sink=2)
    assert made["random"](0.4) == RandomKeys(0.4, seed=4)
    assert made["duo_attention"](0.4) == DuoAttention.from_scores(EVERY["duo_gates"], 0.4, part=0.3, n_recent=3)
    compress = CompressKV.from_scores(EVERY["semantic_retrieval"], 0.4, n_voters=1, layer_weights=(1.0,) * 10)
    assert made["compress_kv"](0.4) == compress
    assert made["razor_attention"](0.4).compensate is False  # pyright: ignore[reportAttributeAccessIssue]


BAD = [
    ({"names": ("snapvk",)}, r"unknown selector 'snapvk' \(did you mean 'snapkv'\?\); "),
    ({"names": ("duo_attention",)}, "selector 'duo_attention' needs the scores of duo_gates; add them"),
    ({"names": ("head_kv",)}, "needs the scores of retrieval_reasoning or retrieval"),
    ({"names": ("razor_attention",)}, "needs the scores of razor_induction and razor_echo"),
    ({"settings": {"snapkv": {"widow": 3}}}, r"snapkv has no setting 'widow' \(did you mean 'window'\?\); "),
    ({"settings": {"snapkv": {"keep_ratio": 0.3}}}, "snapkv has no setting 'keep_ratio'"),
    ({"settings": {"snapkv": {"window": "wide"}}}, "snapkv.window is 'wide', expected int"),
    ({"settings": {"duo_attention": {"part": 0.3}}}, "settings of 'duo_attention', which is not evaluated"),
    ({"names": ("task_kv",), "settings": {"snapkv": {"window": 4}}}, "give settings of random_keys, task_kv"),
]


@pytest.mark.parametrize(("given", "text"), BAD)
def test_bad_names_and_settings(given, text):
    with pytest.raises(UsageError, match=text):
        selectors_of({}, **given)


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
    assert len(full_cache_heads(ranking, 0.625, 0.8)) == 30


@pytest.mark.parametrize("name", ["duo_attention", "razor_attention", "head_kv", "compress_kv"])
def test_heads_of_layers_with_a_window_use_up_no_budget(name):
    model = families.make("gemma2")
    layout = HeadLayout.of(model)
    slides = torch.tensor([kind == "sliding_attention" for kind in model.config.layer_types])
    # the best heads are where keys are dropped
    values = torch.rand(1, layout.layers, layout.heads, generator=torch.Generator().manual_seed(0))
    values = values + torch.where(slides, 0.0, 1.0)[None, :, None]
    needed = registry.get(name, "selector").alternatives[0]
    tables = {each: HeadScores(each, values, kv_heads=layout.kv_heads) for each in needed}
    prompts = kv_oracle.prompts(1)
    selector = selectors_of(tables, model=model)[name](0.8)
    later = kv_oracle.continuation()[:1]
    _, noted = kv_oracle.continued(model, selector, prompts, later, DynamicCache(config=model.config))
    kept = torch.stack([chosen.kept.float().mean(-1) for chosen in noted.values()])
    assert float(kept.mean()) == pytest.approx(0.8, abs=1 / len(prompts[0]))


def test_tables_of_two_models_are_refused():
    with pytest.raises(ScoreError, match="give scores of one model"):
        razor_ranking(table("razor_induction", 0), table("razor_echo", 1, layers=9))
