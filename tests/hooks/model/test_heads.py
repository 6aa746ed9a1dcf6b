import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.errors import HeadError, InterpError, ModelError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet

LAYOUT = HeadLayout(layers=4, heads=6, kv_heads=2, head_dim=8)
HEADS = st.frozensets(st.tuples(st.integers(0, 3), st.integers(0, 5)))


@pytest.mark.parametrize(
    "spec", ["L5H3", "l5h3", "5.3", "5-3", " L5H3 ", (5, 3), [5, 3], Head(5, 3), torch.tensor([5, 3])]
)
def test_a_head_is_parsed_from_each_spelling(spec):
    spec = tuple(spec) if isinstance(spec, torch.Tensor) else spec
    assert Head.parse(spec) == Head(5, 3) == (5, 3)
    assert str(Head.parse(spec)) == "L5H3"


@pytest.mark.parametrize(
    "spec", ["", "L5", "5", "L5H", "H3L5", "L-1H3", "5.3.1", 5.3, 5, None, (1, 2, 3), (True, 1), (-1, 2), "L5H3 x"]
)
def test_invalid_heads_are_refused(spec):
    with pytest.raises(HeadError):
        Head.parse(spec)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("L1H3, 2.4 3-5", [(1, 3), (2, 4), (3, 5)]),
        ("L3H5;L0H0", [(0, 0), (3, 5)]),
        ("L2H*", [(2, h) for h in range(6)]),
        ("L2", [(2, h) for h in range(6)]),
        ("2.*", [(2, h) for h in range(6)]),
        ("L*H3", [(layer, 3) for layer in range(4)]),
        ("L1 - L2", [(layer, h) for layer in (1, 2) for h in range(6)]),
        ("L3H1-L3H3", [(3, 1), (3, 2), (3, 3)]),
        ("L0H4-L1H1", [(0, 4), (0, 5), (1, 0), (1, 1)]),
        ("all", [(layer, h) for layer in range(4) for h in range(6)]),
        ((1, 3), [(1, 3)]),
        ([1, 3], [(1, 3)]),
        ([(1, 3), "L2H2", HeadSet.parse((0, 0))], [(0, 0), (1, 3), (2, 2)]),
        ([], []),
    ],
)  # fmt: skip
def test_sets_are_parsed_from_words_pairs_and_mixtures(spec, expected):
    assert list(HeadSet.parse(spec, LAYOUT)) == expected


@pytest.mark.parametrize("spec", ["L2H*", "L1-L2", "all", "L*H3", "L0H4-L1H1"])
def test_words_for_several_heads_need_the_layout(spec):
    with pytest.raises(HeadError, match="layout"):
        HeadSet.parse(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("L32H0", r"^L32H0: layer 32 of a 4-layer model \(layers run from 0 to 3\)\.$"),
        ("L0H6", r"^L0H6: head 6 of a model with 6 heads a layer \(heads run from 0 to 5\)\.$"),
        ("L2-L9", "layer 9 of a 4-layer"),
        ("L2-L1", "backwards"),
        ("L9H*", "layer 9"),
        ("L1H1 banana", '"banana" does not name heads'),
        ("", "empty text"),
        (7, "7 does not name heads"),
    ],
)
def test_errors_name_the_head_and_the_layout(spec, message):
    with pytest.raises(HeadError, match=message) as caught:
        HeadSet.parse(spec, LAYOUT)
    assert isinstance(caught.value, InterpError)


@given(HEADS, HEADS)
def test_algebra_is_that_of_sets(a, b):
    one, two = HeadSet(tuple(a)), HeadSet(tuple(b))
    assert set(one | two) == a | b
    assert set(one & two) == a & b
    assert set(one - two) == a - b
    assert set(one ^ two) == a ^ b
    assert (one == two) == (a == b)
    assert hash(one | two) == hash(two | one)
    assert list(one) == sorted(a)
    assert len(one) == len(a)
    assert all(head in one for head in a)


@given(HEADS.filter(bool))
def test_masks_words_and_pickles_restore_the_set(a):
    heads = HeadSet(tuple(a))
    assert HeadSet.from_mask(heads.mask(LAYOUT)) == heads
    assert HeadSet.parse(str(heads)) == heads
    assert pickle.loads(pickle.dumps(heads)) == heads
    assert heads.by_layer() == {layer: tuple(h for other, h in sorted(a) if other == layer) for layer, _ in sorted(a)}


def test_repr_is_short_also_for_many():
    assert repr(HeadSet.parse("7.0 5.3")) == "HeadSet(L5H3, L7H0)"
    assert repr(HeadLayout(32, 32, 8).all()) == "HeadSet(L0H0, L0H1, ..., L31H31; 1024 heads)"


def test_membership_accepts_any_spelling():
    assert "L5H3" in HeadSet.parse((5, 3))
    assert (5, 4) not in HeadSet.parse((5, 3))


def test_masks_must_be_bool_tables():
    with pytest.raises(HeadError, match="bool tensor"):
        HeadSet.from_mask(torch.zeros(2, 3))


@given(HEADS.filter(lambda heads: len(heads) <= 12), st.integers(0, 2**32), st.sampled_from(["free", "layer"]))
def test_random_heads_are_as_many_disjoint_and_repeatable(a, seed, match):
    heads = HeadSet(tuple(a))
    drawn = heads.random_like(LAYOUT, seed, match)
    assert len(drawn) == len(heads)
    assert not drawn & heads
    assert drawn == heads.random_like(LAYOUT, seed, match)
    LAYOUT.check(drawn)


def test_random_heads_by_layer_match_each_layer_then_the_nearest():
    heads = HeadSet.parse("L1H0 L1H1 L3H5")
    assert {layer: len(found) for layer, found in heads.random_like(LAYOUT, 0, "layer").by_layer().items()} == {
        1: 2,
        3: 1,
    }
    crowded = HeadSet.parse("L2H0-L2H3", LAYOUT)
    drawn = crowded.random_like(LAYOUT, 0, "layer").by_layer()
    assert drawn[2] == (4, 5)
    assert set(drawn) <= {1, 2, 3}


def test_random_heads_reach_all_remaining_heads():
    heads = HeadSet.parse("L1H0")
    seen = {head for seed in range(400) for head in heads.random_like(LAYOUT, seed)}
    assert seen == set(LAYOUT.all() - heads)


def test_random_heads_avoid_excluded_heads():
    heads, other = HeadSet.parse("L1H0"), LAYOUT.all() - HeadSet.parse("L1H0, L3H3")
    assert heads.random_like(LAYOUT, 0, exclude=other) == HeadSet.parse("L3H3")
    with pytest.raises(HeadError, match="only 0 of the 24 heads are left"):
        heads.random_like(LAYOUT, 0, exclude=LAYOUT.all())
    with pytest.raises(HeadError, match="unknown match"):
        heads.random_like(LAYOUT, 0, "near")  # type: ignore[arg-type]


def test_groups_are_of_neighbouring_query_heads():
    assert [LAYOUT.group(h) for h in range(6)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("counts", [(0, 6, 2), (4, 6, 4), (4, 0, 1), (4, 6, 0)])
def test_impossible_layouts_are_refused(counts):
    with pytest.raises(HeadError, match="not a valid layout"):
        HeadLayout(*counts)


def test_layouts_are_read_from_configs_of_several_families():
    from transformers import FalconConfig, Gemma3Config, GPT2Config, LlamaConfig

    llama = LlamaConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    assert HeadLayout.of(SimpleNamespace(config=llama)) == HeadLayout(3, 4, 2, 8)
    assert HeadLayout.of(llama) == HeadLayout(3, 4, 2, 8)
    assert HeadLayout.of(GPT2Config(n_layer=2, n_head=4, n_embd=64)) == HeadLayout(2, 4, 4, 16)
    falcon = FalconConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, multi_query=True)
    assert HeadLayout.of(falcon) == HeadLayout(2, 4, 1, 16)
    gemma = Gemma3Config(
        text_config={"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    )
    assert HeadLayout.of(gemma) == HeadLayout(2, 8, 4, 16)


def test_objects_without_heads_are_refused():
    with pytest.raises(ModelError, match="num_attention_heads=None"):
        HeadLayout.of(torch.nn.Linear(2, 2))
