"""QK-score against queries and keys of an eager model, and its errors."""

import math

import pytest
import torch
from capture_oracle import content

from interp.analyses import identify, tasks
from interp.errors import PromptError, SpanError
from interp.hooks.prompts.prompts import Prompts
from interp.testing.families import VOCAB

FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gpt_oss")


def tokens(n, seed=0):
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def quiz(n=3):
    spans = [{"options": [(3 * d + 1, 3 * d + 4) for d in range(4 + i % 2)]} for i in range(n)]
    return Prompts.from_ids([tokens(24 + i, i) for i in range(n)], spans=spans, meta=[{"option": i} for i in range(n)])


def assert_qk_score_equals_queries_and_keys(model, eager, prompts):
    by_fit, by_pattern = identify.qk_score(model, prompts), identify.qk_score(model, prompts, attention=True)
    assert (by_fit.name, by_pattern.name) == ("qk_score", "qk_score_attention")
    for i, prompt in enumerate(prompts):
        q, k = content(model, prompt)
        ends = [stop - 1 for _, stop in prompt.spans["options"]]
        fit = torch.einsum("lhd,lhkd->lhk", q[:, :, -1], k[:, :, ends]) / math.sqrt(q.shape[-1])
        for scores, wanted in ((by_fit, fit), (by_pattern, eager(model, prompt)[:, :, -1, ends])):
            torch.testing.assert_close(scores.extras["options"][i, ..., : len(ends)], wanted, atol=1e-4, rtol=0)
            assert torch.equal(scores.per_prompt[i], (wanted.argmax(-1) == prompt.meta["option"]).float())


@pytest.mark.parametrize("name", FAMILIES)
def test_qk_score_equals_queries_and_keys(tiny_model, eager, name):
    assert_qk_score_equals_queries_and_keys(tiny_model(name), eager, quiz())


def test_qk_score_equals_queries_and_keys_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    assert_qk_score_equals_queries_and_keys(model, eager, tasks.get("choice").prompts(tokenizer, n=2))


def test_a_head_that_sees_no_option_points_at_none(tiny_model):
    model = tiny_model("gemma2")
    spans = [{"options": [(1, 3), (3, 5)]}]
    for option in range(2):
        prompts = Prompts.from_ids([tokens(80)], spans=spans, meta=[{"option": option}])
        for attention in (False, True):
            scores = identify.qk_score(model, prompts, attention=attention)
            # layer 0 sees the last 32 tokens only
            assert (scores.per_prompt[0, 0] == 0).all()


def test_errors_of_qk_score(tiny_model):
    model, ids = tiny_model("llama"), [tokens(20)]
    with pytest.raises(SpanError, match='prompt 0 has no span "options"'):
        identify.qk_score(model, Prompts.from_ids(ids))
    with pytest.raises(SpanError, match='"options" of prompt 0 has one range'):
        identify.qk_score(model, Prompts.from_ids(ids, spans=[{"options": (1, 3)}], meta=[{"option": 0}]))
    two = [{"options": [(1, 3), (3, 5)]}]
    for meta, said in (({}, "None"), ({"option": 2}, "2")):
        with pytest.raises(PromptError, match=f'"option" of prompt 0 is {said}; give the number, from 0'):
            identify.qk_score(model, Prompts.from_ids(ids, spans=two, meta=[meta]))
