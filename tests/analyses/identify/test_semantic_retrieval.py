"""Semantic retrieval and retrieval reasoning against their definitions on eager attention, step by step."""

import pytest
import torch
from capture_oracle import greedy

from interp.analyses import identify, tasks
from interp.errors import SpanError
from interp.hooks.prompts.prompts import Prompts
from interp.testing.families import VOCAB

FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gpt_oss")


def tokens(n, seed=0):
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def answered(length=40, n=2):
    """Prompts of random tokens whose answer is most of them, and a distractor, for models that write nonsense."""
    spans = [
        {"answer": (4, 24), "needle": (2, 30), "distractor": [(30, 33), (35, 38)]},
        {"answer": (1, 21), "needle": (1, 21)},
    ]
    return Prompts.from_ids([tokens(length - 3 * i, 7 + i) for i in range(n)], spans=spans[:n])


def assert_semantic_and_reasoning_equal_the_steps(model, eager, prompts, settings, tokenizer=None):
    """Where token t of the reply is made: attention on a span, and on its keys among the K of the largest."""
    semantic_retrieval = {
        span: identify.semantic_retrieval(model, prompts, span=span, **settings) for span in ("answer", "needle")
    }
    retrieval_reasoning = identify.retrieval_reasoning(model, prompts, **settings)
    for i, prompt in enumerate(prompts):
        ids = greedy(model, prompt, settings["max_new_tokens"], tokenizer)
        assert ids
        p = eager(model, Prompts.from_ids([[*prompt.ids, *ids]])[0])[:, :, len(prompt) - 1 :]
        for span, found in semantic_retrieval.items():
            (start, stop), total = prompt.spans[span][0], torch.zeros(p.shape[:2])
            for t, token in enumerate(ids):
                total += prompt.ids[start:stop].count(token) * p[:, :, t, start:stop].sum(-1)
            torch.testing.assert_close(found.per_prompt[i], total, atol=1e-4, rtol=0)
        (start, stop), total, other = prompt.spans["answer"][0], torch.zeros(p.shape[:2]), torch.zeros(p.shape[:2])
        distractors = prompt.spans.get("distractor", ())
        for t in range(min(len(ids), stop - start)):
            row = p[:, :, t]
            best = row >= row.topk(min(stop - start, 64), -1).values[..., -1:]
            total += (row * best)[..., start:stop].sum(-1) / (stop - start)
            size = sum(b - a for a, b in distractors)
            other += sum((row * best)[..., a:b].sum(-1) / size for a, b in distractors)
        torch.testing.assert_close(retrieval_reasoning.per_prompt[i], total, atol=1e-4, rtol=0)
        if distractors:
            torch.testing.assert_close(retrieval_reasoning.extras["distractor"][i], other, atol=1e-4, rtol=0)
        else:
            assert retrieval_reasoning.extras["distractor"][i].isnan().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_decode_steps_equal_eager(tiny_model, eager, name):
    settings = {"recall": -1.0, "max_new_tokens": 24}
    assert_semantic_and_reasoning_equal_the_steps(tiny_model(name), eager, answered(), settings)


def test_a_long_span_takes_64_keys(tiny_model, eager):
    spans = [{"answer": (2, 110), "needle": (2, 110)}]
    prompts, settings = Prompts.from_ids([tokens(120)], spans=spans), {"recall": -1.0, "max_new_tokens": 3}
    assert_semantic_and_reasoning_equal_the_steps(tiny_model("llama"), eager, prompts, settings)


@pytest.mark.parametrize(
    ("kind", "n", "written"), [("inferred", 1, 6), pytest.param("literal", 2, 16, marks=pytest.mark.slow)]
)
def test_scores_of_decode_steps_equal_eager_on_the_demo_model(demo, eager, kind, n, written):
    model, tokenizer = demo
    prompts = tasks.needle(tokenizer, lengths=(180,), n=n, needles=3, kind=kind, seed=5)
    settings = {"recall": -1.0, "max_new_tokens": written}
    assert_semantic_and_reasoning_equal_the_steps(model, eager, prompts, settings, tokenizer)


def test_replies_that_are_wrong_do_not_count(tiny_model):
    model, prompts = tiny_model("llama"), answered()
    for method in (identify.semantic_retrieval, identify.retrieval_reasoning):
        scores = method(model, prompts, recall=1.0, max_new_tokens=4)
        assert scores.counted == 0
        assert all(extra.isnan().all() for name, extra in scores.extras.items() if name != "at_limit")


@pytest.mark.parametrize("method", [identify.semantic_retrieval, identify.retrieval_reasoning])
def test_errors_of_decode_scores(tiny_model, method):
    model, ids = tiny_model("llama"), [tokens(20)]
    with pytest.raises(SpanError, match='prompt 0 has no span "answer"'):
        method(model, Prompts.from_ids(ids))
    with pytest.raises(SpanError, match="prompt 0 has its answer in 2 places"):
        method(model, Prompts.from_ids(ids, spans=[{"answer": [(1, 2), (5, 6)]}]))
    with pytest.raises(SpanError, match='prompt 0 has no span "clue"'):
        method(model, Prompts.from_ids(ids, spans=[{"answer": (1, 2)}]), span="clue")
