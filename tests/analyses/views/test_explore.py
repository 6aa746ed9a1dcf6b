"""Exploring one prompt: reductions are those of eager patterns, default heads are the planted ones, files come back."""

from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from capture_oracle import eager_patterns
from tokenizers_tiny import byte_level

import interp
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.explore import SUMMARIES, Explored, cost, explore
from interp.errors import CostError, HeadError, PromptError, ScoreError, SpanError, UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families, planted

module = import_module("interp.analyses.views.explore")

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
    monkeypatch.setattr(module, "N_CHOSEN", 1)
    monkeypatch.setattr(module, "MIN_DISTANCE", 4)
    made = planted.make("induction", 1, family)
    repeated, control = (
        Prompts.from_ids(planted.prompts("induction", 1, shuffled=shuffled).ids[:1]) for shuffled in (False, True)
    )
    assert explore(made.model, repeated).heads == HeadSet.parse([made.head])
    assert explore(made.model, control).heads != HeadSet.parse([made.head])


def test_default_heads_are_twelve_by_definition(monkeypatch):
    monkeypatch.setattr(module, "N_LAST_QUERIES", 50)
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
    with pytest.raises(SpanError, match="no span 'answer' to mark; it has needle, context, twice"):
        explore(model, one, heads="L0H0", marks=["answer"])
    plain = explore(tiny_model("llama"), prompt(5))
    assert plain.tokens == tuple(map(str, prompt(5)[0].ids))


def test_files_give_back_every_number(explored, tiny_model, tmp_path):
    path = explored.save(tmp_path / "one")
    assert path.name == "one.json"
    found = Explored.load(path, tiny_model("llama"))
    for name in ("title", "tokens", "layout", "block", "mapped", "heads", "marks", "settings", "provenance"):
        assert getattr(explored, name) == getattr(found, name), name
    for name in ("maps", "keys", "probs"):
        assert torch.equal(getattr(explored, name), getattr(found, name)), name
    for name, table in explored.summaries.items():
        assert torch.equal(table, found.summaries[name])
    assert found.maps.triu(1).abs().max() == 0
    assert repr(found).startswith("Explored('One', 200 tokens in blocks of 16, 8 of 8 heads mapped, top 3 keys of 2")


def test_a_frame_has_a_row_for_each_head(explored):
    frame = explored.to_frame()
    assert list(frame["name"]) == [str(head) for head in explored.layout.all()]
    assert frame["entropy"].tolist() == explored.summaries["entropy"].flatten().tolist()
    assert "L1H2" in explored.summary()


@pytest.mark.parametrize("n_tokens", [70, 1024, 16_384])
def test_maps_of_all_heads_keep_a_limit_of_bytes(n_tokens):
    layout = HeadLayout(32, 32, 8)
    block = module.block_within(n_tokens, layout, 700_000)
    blocks = -(-n_tokens // block)
    assert block & (block - 1) == 0
    assert layout.size * blocks * blocks / 2 <= 700_000
    assert block == 1 or layout.size * (2 * blocks - 1) ** 2 / 2 > 0.9 * 700_000


def test_the_title_is_the_question_of_the_prompt(tiny_model):
    one = Prompts.from_ids([list(range(3, 20))], meta=[{"question": "Which spice?"}])
    assert explore(tiny_model("llama"), one, heads="L0H0").title == "Which spice?"
    assert explore(tiny_model("llama"), one, heads="L0H0", max_map_bytes=10, title="Mine").title == "Mine"


def test_cost_is_known_before_it_is_paid(tiny_model, monkeypatch):
    model, one = tiny_model("llama"), prompt(200)
    needed = cost(model, one, heads="L0H1, L1H2", block=16, k=3)
    held = 8 * 200 * 3 * 4 + 8 * 13 * 13 * 4 + 2 * 200 * 3 * 12
    assert needed.total == 2 * held
    assert "top_keys(3) of 2 heads" in str(needed)
    assert "top_keys(3) of 8 heads" in str(cost(model, one, block=16, k=3))
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed.total))
    try:
        with pytest.raises(CostError, match=r"exploring 200 tokens takes (\S+ \SB) of \1 free; name the heads"):
            explore(model, one, heads="L0H1, L1H2", block=16, k=3)
    finally:
        handle.remove()
    assert not passes


def test_wrong_arguments_are_refused_in_one_sentence(tiny_model):
    model, one = tiny_model("llama"), prompt()
    with pytest.raises(PromptError, match=r"2 prompts were given to explore; give one, such as prompts\[:1\]"):
        explore(model, one + one)
    with pytest.raises(PromptError, match="at least two tokens"):
        explore(model, prompt(1))
    for heads in ("L0H9", "L7H0"):
        with pytest.raises(HeadError, match=heads):
            explore(model, one, heads=heads)
        with pytest.raises(HeadError, match=heads):
            explore(model, one, maps=heads)
    for block in (0, -3, 2.5, True):
        with pytest.raises(UsageError, match="is no number of tokens; give a whole number"):
            explore(model, one, block=block)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"top_keys\(65\) is out of range"):
        explore(model, one, k=65)
    assert interp.explore is explore


def test_parts_that_do_not_fit_are_refused(explored, tiny_model, tmp_path):
    for change in (
        {"maps": explored.maps[:3]},
        {"probs": explored.probs[:, :, :1]},
        {"keys": explored.keys[:, :9]},
        {"tokens": explored.tokens[:3]},
        {"marks": {"mark": ((20, 999),)}},
    ):
        # the shape checks of the tests may refuse first, with a TypeError
        with pytest.raises((ScoreError, TypeError)):
            replace(explored, **change)
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ScoreError, match="is not JSON"):
        Explored.load(path)
    with pytest.raises(ScoreError, match="cannot be read"):
        Explored.load(tmp_path / "nowhere")
    with pytest.raises(ScoreError, match="belong"):
        Explored.load(explored.save(tmp_path / "one"), families.make("llama", seed=5))
    bare = replace(explored, provenance=None).save(tmp_path / "bare")
    with pytest.raises(ScoreError, match="does not name the model"):
        Explored.load(bare, tiny_model("llama"))
