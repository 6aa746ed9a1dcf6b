"""Detectors against the definition on eager attention maps, and against TransformerLens' detect_head."""

from typing import Any

import pytest
import torch
from capture_oracle import greedy

from interp.analyses import identify, tasks
from interp.analyses.identify._replies import answer
from interp.errors import PromptError, SpanError, UsageError
from interp.hooks.prompts.prompts import Prompts


def test_position_scores_equal_eager_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    repeated = tasks.repeated(tokenizer, n=25, batch=2, seed=3)
    texts = tasks.passages(tokenizer, n=2, length=64, seed=3)
    scores = {
        "induction": identify.induction(model, repeated),
        "duplicate": identify.duplicate_token(model, repeated),
        "previous": identify.previous_token(model, texts),
        "sinks": identify.sinks(model, texts),
    }
    for i in range(2):
        p = eager(model, repeated[i])
        start = repeated[i].spans["second"][0][0]
        n = start - repeated[i].spans["first"][0][0]
        rows = torch.arange(start, len(repeated[i]))
        torch.testing.assert_close(
            scores["induction"].per_prompt[i], p[:, :, rows, rows - n + 1].mean(-1), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            scores["duplicate"].per_prompt[i], p[:, :, rows, rows - n].mean(-1), atol=1e-4, rtol=0
        )
        p = eager(model, texts[i])
        torch.testing.assert_close(scores["previous"].per_prompt[i], p.diagonal(-1, -2, -1).mean(-1), atol=1e-4, rtol=0)
        torch.testing.assert_close(scores["sinks"].per_prompt[i], p[..., 0].mean(-1), atol=1e-4, rtol=0)
        alpha = p.sum(-2) / torch.arange(64, 0, -1)
        torch.testing.assert_close(scores["sinks"].extras["positions"][i], alpha[..., :32], atol=1e-4, rtol=0)
        assert ((scores["sinks"].extras["columns"][i] - (alpha > 0.1).sum(-1)).abs() > 0).float().mean() < 0.01


@pytest.mark.slow
def test_retrieval_counts_equal_eager_exactly_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    prompts = tasks.needle(tokenizer, lengths=(180,), n=2, seed=5)
    found = identify.retrieval(model, prompts, form="forced")
    decoded = identify.retrieval(model, prompts, recall=-1.0)
    for i, prompt in enumerate(prompts):
        forced = answer(prompt)
        replies = {"forced": forced, "decode": greedy(model, prompt, tokenizer=tokenizer)}
        start, stop = prompt.spans["answer"][0]
        for form, ids in replies.items():
            longer = Prompts.from_ids([[*prompt.ids, *ids]])[0]
            p = eager(model, longer)
            count = torch.zeros(p.shape[:2])
            for t, token in enumerate(ids):
                best = p[:, :, len(prompt.ids) - 1 + t].argmax(-1)
                pasted = torch.tensor(longer.ids)[best] == token
                count += (best >= start) & (best < stop) & pasted
            scores = found if form == "forced" else decoded
            assert torch.equal(scores.per_prompt[i] * (stop - start), count), form


@pytest.mark.parametrize("name", ["induction", "previous_token", "duplicate_token"])
def test_mul_is_what_transformer_lens_finds(tiny_model, name):
    pytest.importorskip("transformer_lens")
    from transformer_lens.head_detector import detect_head
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    from interp.testing import families

    model = tiny_model("llama")
    rng = torch.Generator().manual_seed(0)
    half = torch.randperm(100, generator=rng)[:30] + 10
    ids = torch.cat([half, half])
    span = {"first": (0, 30), "second": (30, 60)}
    prompts = Prompts.from_ids([ids.tolist()], spans=[{} if name == "previous_token" else span])
    ours = getattr(identify, name)(model, prompts).extras["mul"][0]

    other: Any = build_bridge_from_module(families.make("llama"), type(model).__name__, hf_config=model.config)
    pattern: Any = {"induction": "induction_head", "previous_token": "previous_token_head"}.get(name)
    # detect_head asks the model for the tokens of a text; the ids are given here
    other.to_tokens = lambda *_, **__: ids[None]
    theirs = detect_head(other, "text", pattern or "duplicate_token_head", error_measure="mul")
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)


def test_induction_on_text_uses_the_latest_earlier_occurrence(tiny_model, eager):
    model = tiny_model("llama")
    prompts = Prompts.from_ids([[5, 6, 7, 5, 8, 5, 5]])
    p = eager(model, prompts[0])
    scores = identify.induction(model, prompts)
    # query 3 looks back to key 0, query 5 to key 3; query 6 follows its own copy at once
    torch.testing.assert_close(scores.per_prompt[0], (p[:, :, 3, 1] + p[:, :, 5, 4]) / 2, atol=1e-5, rtol=0)
    duplicates = identify.duplicate_token(model, prompts)
    expected = (p[:, :, 3, 0] + p[:, :, 5, [0, 3]].sum(-1) + p[:, :, 6, [0, 3, 5]].sum(-1)) / 3
    torch.testing.assert_close(duplicates.per_prompt[0], expected, atol=1e-5, rtol=0)


def test_value_weighted_sinks(tiny_model, eager):
    model = tiny_model("qwen3")
    prompts = Prompts.from_ids([list(range(5, 40))])
    weighted = identify.sinks(model, prompts, by_value=True)
    from interp.hooks.read import keep
    from interp.hooks.read.capture import capture, run

    with capture(model, keep.v(), prompts) as cap:
        run(model, prompts)
    norm = cap[keep.v()][0].norm(dim=-1).repeat_interleave(2, 1)[:, :, None]
    p = eager(model, prompts[0]) * norm
    alpha = (p / p.sum(-1, keepdim=True))[..., 0].mean(-1)
    torch.testing.assert_close(weighted.per_prompt[0], alpha, atol=1e-5, rtol=0)


def test_learned_sinks_are_reported_apart(tiny_model):
    prompts = Prompts.from_ids([list(range(5, 40))])
    assert (identify.sinks(tiny_model("gpt_oss"), prompts).extras["learned"] > 1e-3).all()
    assert (identify.sinks(tiny_model("llama"), prompts).extras["learned"] == 0).all()


def test_what_has_no_target_or_answer_is_an_error(tiny_model):
    model = tiny_model("llama")
    fresh = Prompts.from_ids([list(range(5, 20))])
    with pytest.raises(PromptError, match="no query with a target"):
        identify.duplicate_token(model, fresh)
    with pytest.raises(SpanError, match='prompt 0 has no span "answer"'):
        identify.retrieval(model, fresh)
    twice = Prompts.from_ids([list(range(5, 20))], spans=[{"answer": [(1, 2), (5, 6)]}])
    with pytest.raises(SpanError, match="in 2 places"):
        identify.retrieval(model, twice)
    with pytest.raises(UsageError, match="form is 'decode' or 'forced'"):
        identify.retrieval(model, twice, form="greedy")  # pyright: ignore[reportArgumentType]


def _weighted(model, prompts, eager):
    """Attention of one prompt, weighted by the norms of the values and divided by the sum of each row."""
    from interp.hooks.read import keep
    from interp.hooks.read.capture import capture, run

    with capture(model, keep.v(), prompts) as cap:
        run(model, prompts)
    norm = cap[keep.v()][0].norm(dim=-1)
    p = eager(model, prompts[0])
    weighted = p * norm.repeat_interleave(p.shape[1] // norm.shape[1], 1)[:, :, None]
    return weighted / weighted.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ["sinks", "duplicate_token", "induction", "previous_token"])
def test_scores_weighted_by_value_come_along_with_plain_ones(tiny_model, name):
    model = tiny_model("qwen3")
    prompts = Prompts.from_ids([[5, 6, 7, 5, 8, 5, 6, 7, 9], [5, 6, 5, 6]])
    detector = getattr(identify, name)
    plain, weighted = detector(model, prompts), detector(model, prompts, by_value=True)
    torch.testing.assert_close(plain.extras["by_value"], weighted.per_prompt)
    torch.testing.assert_close(weighted.extras["by_value"], weighted.per_prompt)
    assert not torch.allclose(plain.per_prompt, weighted.per_prompt)


def test_retrieval_by_value_takes_the_key_with_the_largest_weighted_attention(tiny_model, eager):
    model, ids = tiny_model("qwen3"), [5, 6, 7, 8, 9, 10, 11, 12, 6, 13, 7]
    answer = (1, 4)
    prompts = Prompts.from_ids([ids], spans=[{"answer": [answer]}])
    found = identify.retrieval(model, prompts, form="forced", by_value=True)
    whole = Prompts.from_ids([ids + ids[1:3]])
    weighted = _weighted(model, whole, eager)
    hits = torch.zeros(weighted.shape[:2])
    for step, token in enumerate(ids[1:4]):
        best = weighted[:, :, len(ids) - 1 + step].argmax(-1)
        here = (best >= answer[0]) & (best < answer[1])
        hits += here & (torch.tensor(whole[0].ids)[best] == token)
    torch.testing.assert_close(found.per_prompt[0], hits / 3)
    decoded = identify.retrieval(model, prompts, recall=-1.0, max_new_tokens=3, by_value=True)
    assert decoded.settings["by_value"]
    assert decoded.per_prompt.shape == found.per_prompt.shape
