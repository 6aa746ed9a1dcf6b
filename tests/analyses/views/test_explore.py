"""Exploring one prompt: reductions are those of eager patterns, default heads are the planted ones, files come back."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from capture_oracle import eager_patterns
from tokenizers_tiny import byte_level

import interp
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views import explore as module
from interp.analyses.views.explore import SUMMARIES, Explored, cost, explore
from interp.errors import CostError, HeadError, PromptError, ScoreError, SpanError, UsageError
from interp.hooks.model.heads import HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families, planted

# grouped heads, a window, windows and learned sinks, learned positions
FAMILIES = ["llama", "mistral", "gpt_oss", "gpt2"]
CLOSE = {"atol": 1e-5, "rtol": 0}


def prompt(length: int = 70, seed: int = 0, **spans: Any) -> Prompts:
    ids = torch.randint(3, families.VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return Prompts.from_ids([ids.tolist()], spans=[spans])


@pytest.fixture(scope="module")
def explored(tiny_model) -> Explored:
    return explore(tiny_model("llama"), prompt(200, mark=(20, 30)), heads="L0H1, L1H2", block=16, k=3, title="One")


@pytest.mark.parametrize("name", FAMILIES)
def test_reductions_are_those_of_the_eager_pattern(tiny_model, name):
    model, one = tiny_model(name), prompt(70)
    found = explore(model, one, heads="L0H1, L1H3", block=16, k=3)
    p = eager_patterns(model, one)[0]
    size = torch.tensor([16.0] * 4 + [6.0])
    rows = torch.nn.functional.pad(p, (0, 10, 0, 10)).unflatten(-1, (5, 16)).sum(-1).unflatten(-2, (5, 16)).sum(-2)
    maps = rows / size[:, None]
    torch.testing.assert_close(found.maps, maps.flatten(0, 1), **CLOSE)
    torch.testing.assert_close(found.map("L1H2"), maps[1, 2], **CLOSE)

    apart = torch.arange(5)[:, None] - torch.arange(5)
    reach = (rows * apart * 16).sum((-1, -2)) / rows.sum((-1, -2))
    over_keys = p / p.sum(-1, keepdim=True)
    expected = {
        "first": p[:, :, 1:, 0].mean(-1),
        "previous": p.diagonal(-1, -2, -1).mean(-1),
        "near": rows.masked_fill(apart > 1, 0.0).sum((-1, -2)) / 70,
        "distance": reach,
        "entropy": torch.special.entr(over_keys).sum(-1).mean(-1),
    }
    assert set(found.summaries) == set(SUMMARIES) == set(expected)
    for what, table in expected.items():
        torch.testing.assert_close(found.summaries[what], table, atol=1e-3 if what == "distance" else 1e-4, rtol=0)

    for row, (layer, head) in enumerate([(0, 1), (1, 3)]):
        best = p[layer, head].topk(3)
        seen = best.values > 0
        torch.testing.assert_close(found.probs[row], best.values, **CLOSE)
        assert (found.keys[row] == best.indices)[seen].float().mean() > 0.99
        assert (found.keys[row, 0] == torch.tensor([0, -1, -1])).all()
        assert [key for key, _ in found.top((layer, head), 69)] == best.indices[69].tolist()


def test_all_heads_and_chosen_heads_are_read_in_one_forward(tiny_model):
    model, passes = tiny_model("llama"), []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        explore(model, prompt(), heads="L0H0")
        assert len(passes) == 1
        explore(model, prompt())
        assert len(passes) == 2
    finally:
        handle.remove()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_default_heads_begin_with_the_planted_one_that_looks_back(monkeypatch, family):
    monkeypatch.setattr(module, "CHOSEN", 1)
    monkeypatch.setattr(module, "NEAR", 4)
    made = planted.make("induction", 1, family)
    repeated, control = (
        Prompts.from_ids(planted.prompts("induction", 1, shuffled=shuffled).ids[:1]) for shuffled in (False, True)
    )
    assert explore(made.model, repeated).heads == HeadSet.parse([made.head])
    assert explore(made.model, control).heads != HeadSet.parse([made.head])


def test_default_heads_are_twelve_by_definition(monkeypatch):
    monkeypatch.setattr(module, "END", 50)
    model, one = families.make("llama", layers=4), prompt(90)
    p = eager_patterns(model, one)[0]
    weight, key = p.max(-1)
    back = torch.arange(90) - key
    score = (weight * (key > 0) * (back >= 16))[..., -50:].square().mean(-1)
    expected = HeadSet.parse([divmod(i, 4) for i in score.flatten().topk(12).indices.tolist()])
    found = explore(model, one)
    assert found.heads == expected
    assert found.settings["heads"] == "looking back"
    given = explore(model, one, heads=expected)
    assert torch.equal(found.keys, given.keys)
    torch.testing.assert_close(found.probs, given.probs, **CLOSE)


@pytest.mark.parametrize(
    ("tokens", "block"), [(2, 1), (96, 1), (97, 2), (193, 3), (289, 4), (4000, 48), (4096, 48), (16_384, 192)]
)
def test_the_usual_block_makes_at_most_96_blocks(tokens, block):
    assert module._usual_block(tokens) == block
    assert -(-tokens // block) <= 96


def test_heads_are_given_as_names_sets_or_scores(tiny_model):
    model, one = tiny_model("llama"), prompt()
    values = torch.zeros(1, 2, 4)
    values[0, 1, 2], values[0, 0, 3] = 2.0, 1.0
    for heads in ("L1H2, L0H3", HeadSet.parse("L0H3 L1H2"), HeadScores("x", values).top(2)):
        assert explore(model, one, heads=heads).heads == HeadSet.parse("L0H3, L1H2")
    bare = explore(model, one, heads=[], maps="L1H0, L0H2")
    assert list(bare.keys.shape) == [0, 70, 4]
    whole = explore(model, one, heads=[])
    assert torch.equal(bare.map("L1H0"), whole.map("L1H0"))
    assert torch.equal(bare.map("L0H2"), whole.map("L0H2"))
    assert bare.maps.shape[0] == 2
    assert torch.equal(bare.summaries["near"], whole.summaries["near"])
    with pytest.raises(HeadError, match="L0H0 has no block map here"):
        bare.map("L0H0")
    with pytest.raises(HeadError, match="L0H0 has no top keys here"):
        bare.top("L0H0", 3)


def test_tokens_and_marks_come_from_the_prompt(tiny_model):
    model, tokenizer = families.make("llama"), byte_level()
    model.resize_token_embeddings(len(tokenizer))
    text = "in the the the Paris needle\n in the end"
    spans = {"needle": "needle", "context": (0, 36), "twice": {"text": "the", "occurrence": "all"}}
    one = Prompts.encode(tokenizer, [text], spans=spans)
    found = explore(model, one, heads="L0H0")
    assert "".join(found.tokens) == text
    assert "\n" in found.tokens
    # what covers most of the prompt says nothing about where
    assert found.marks == {name: one[0].spans[name] for name in ("needle", "twice")}
    assert len(found.marks["twice"]) == 4
    assert explore(model, one, heads="L0H0", marks=["context"]).marks == {"context": one[0].spans["context"]}
    with pytest.raises(SpanError, match=r"no span 'answer' \(it has needle, context, twice\)"):
        explore(model, one, heads="L0H0", marks=["answer"])
    plain = explore(tiny_model("llama"), prompt(5))
    assert plain.tokens == tuple(map(str, prompt(5)[0].ids))


def same(one: Explored, other: Explored) -> None:
    """Everything but the rounding of weights."""
    for name in ("title", "tokens", "layout", "block", "mapped", "heads", "marks", "settings", "provenance"):
        assert getattr(one, name) == getattr(other, name), name
    assert torch.equal(one.keys, other.keys)
    for name, table in one.summaries.items():
        assert torch.equal(table, other.summaries[name])


def test_files_give_back_what_was_read_but_for_the_rounding(explored, tiny_model, tmp_path):
    path = explored.save(tmp_path / "one")
    assert path.name == "one.json"
    found = Explored.load(path, tiny_model("llama"))
    same(explored, found)
    for one, other in ((explored.maps, found.maps), (explored.probs, found.probs)):
        off = (one - other).abs()
        assert bool((off <= one.sqrt() / 255 + 4e-6).all())
        assert off.max() < 0.004
        assert bool((other[one > 4e-6] > 0).all())
        assert bool((other[one == 0] == 0).all())
    assert (explored.maps - found.maps).abs().max() > 0
    assert found.maps.triu(1).abs().max() == 0
    # rounded once, nothing changes any more
    again = Explored.from_dict(json.loads(json.dumps(found.to_dict())))
    same(found, again)
    assert torch.equal(again.maps, found.maps)
    assert torch.equal(again.probs, found.probs)
    assert repr(found).startswith("Explored('One', 200 tokens in blocks of 16, 8 of 8 heads mapped, top 3 keys of 2")


def test_every_weight_comes_back_within_the_stated_bound(explored):
    weights = torch.logspace(-7, 0, 200 * 3 * 2).view(2, 200, 3)
    found = Explored.from_dict(replace(explored, probs=weights).to_dict()).probs
    assert bool(((found - weights).abs() <= weights.sqrt() / 255 + 4e-6).all())
    assert bool((found[weights > 4e-6] > 0).all())


def test_positions_beyond_two_bytes_are_exact(explored):
    n = 70_000
    keys = torch.randint(-1, n, (1, n, 1)).clamp(max=torch.arange(n)[:, None])
    long = replace(
        explored, tokens=("x",) * n, block=1024, heads=HeadSet.parse("L1H1"), keys=keys, probs=torch.ones(1, n, 1),
        maps=torch.zeros(8, 69, 69), marks={},
    )  # fmt: skip
    found = Explored.from_dict(long.to_dict())
    assert torch.equal(found.keys, keys)
    assert (keys == -1).any()
    assert keys.max() > 65_535


def test_cost_is_told_before_it_is_paid(tiny_model, monkeypatch):
    model, one = tiny_model("llama"), prompt(200)
    told = cost(model, one, heads="L0H1, L1H2", block=16, k=3)
    held = 8 * 200 * 3 * 4 + 8 * 13 * 13 * 4 + 2 * 200 * 3 * 12
    assert told.total == 2 * held
    assert "top_keys(3) of 2 heads" in str(told)
    assert "top_keys(3) of 8 heads" in str(cost(model, one, block=16, k=3))
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=told.total))
    try:
        with pytest.raises(CostError, match=r"exploring 200 tokens takes (\S+ \SB) of \1 free: name the heads"):
            explore(model, one, heads="L0H1, L1H2", block=16, k=3)
    finally:
        handle.remove()
    assert not passes


def test_wrong_arguments_are_told_in_one_sentence(tiny_model):
    model, one = tiny_model("llama"), prompt()
    with pytest.raises(PromptError, match=r"2 prompts to explore: give one, such as prompts\[:1\]"):
        explore(model, one + one)
    with pytest.raises(PromptError, match="at least two tokens"):
        explore(model, prompt(1))
    for heads in ("L0H9", "L7H0"):
        with pytest.raises(HeadError, match=heads):
            explore(model, one, heads=heads)
        with pytest.raises(HeadError, match=heads):
            explore(model, one, maps=heads)
    for block in (0, -3, 2.5, True):
        with pytest.raises(UsageError, match="is no size: give the tokens of a block"):
            explore(model, one, block=block)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"top_keys\(65\) is out of range"):
        explore(model, one, k=65)
    assert interp.explore is explore


def broken(stored: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**stored, **changes}


def test_broken_data_are_refused(explored, tiny_model, tmp_path):
    stored = explored.to_dict()
    many = module._pack(torch.zeros(10_000_000), "u1")
    cases = [
        broken(stored, format="interp.head_scores/1"),
        broken(stored, maps=stored["maps"][:40]),
        broken(stored, maps="not base64!"),
        broken(stored, maps=many),
        broken(stored, probs=stored["maps"]),
        broken(stored, back=module._pack(torch.full((2, 3, 200), 300), "<u2")),
        broken(stored, chosen=["L0H1"]),
        broken(stored, chosen=["L9H1", "L0H1"]),
        broken(stored, layers=0),
        broken(stored, block="16"),
        broken(stored, tokens=[1, 2, 3]),
        broken(stored, tokens=None),
        broken(stored, marks={"mark": [[20, 999]]}),
        broken(stored, marks=["mark"]),
        broken(stored, summaries={}),
        broken(stored, provenance={"model": "x"}),
        [],
        None,
    ]
    for case in cases:
        with pytest.raises(ScoreError):
            Explored.from_dict(case)  # pyright: ignore[reportArgumentType]
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ScoreError, match="is not JSON"):
        Explored.load(path)
    with pytest.raises(ScoreError, match="cannot be read"):
        Explored.load(tmp_path / "nowhere")
    with pytest.raises(ScoreError, match="belong to"):
        Explored.load(explored.save(tmp_path / "one"), families.make("llama", seed=5))
    bare = replace(explored, provenance=None).save(tmp_path / "bare")
    with pytest.raises(ScoreError, match="does not say which model"):
        Explored.load(bare, tiny_model("llama"))
