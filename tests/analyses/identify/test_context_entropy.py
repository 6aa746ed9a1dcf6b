"""Entropy across contexts: against eager attention, group by group, with its task."""

from dataclasses import replace

import capture_oracle
import pytest
import torch
from detectors import prompts as planted_prompts

from interp.analyses import identify, tasks
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.testing import planted


def grouped(lengths, groups, gold):
    prompts = capture_oracle.prompts(lengths)
    meta = [{"group": group, "gold": right} for group, right in zip(groups, gold, strict=True)]
    return replace(prompts, items=tuple(replace(p, meta=m) for p, m in zip(prompts, meta, strict=True)))


def assert_mean_spread_and_choice_equal_eager_attention(model, eager, prompts, groups, gold, scores):
    """groups: the prompts of each row; gold: which of them answers, None where no choice is scored."""
    values = []
    for prompt in prompts:
        p = eager(model, prompt)[:, :, -1]
        values.append(-torch.special.xlogy(p, p).sum(-1))
    values = torch.stack(values)
    for row, (own, right) in enumerate(zip(groups, gold, strict=True)):
        h = values[own]
        torch.testing.assert_close(scores.per_prompt[row], h.mean(0), atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.extras["spread"][row], h.std(0, correction=0), atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.extras["contexts"][row, ..., : len(own)], h.movedim(0, -1), atol=1e-4, rtol=0)
        assert scores.extras["contexts"][row, ..., len(own) :].isnan().all()
        if right is None:
            assert scores.extras["chosen"][row].isnan().all()
        else:
            assert torch.equal(scores.extras["chosen"][row], (h.argmin(0) == right).float())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_mean_spread_and_choice_equal_eager_attention(tiny_model, eager, name):
    model = tiny_model(name)
    gold = [False, True, False, False, True, False]
    prompts = grouped((30, 26, 41, 33, 28, 39), ["a", "a", "b", "a", "b", "c"], gold)
    scores = identify.context_entropy(model, prompts, batch_size=4)
    groups = [[0, 1, 3], [2, 4], [5]]
    assert_mean_spread_and_choice_equal_eager_attention(model, eager, prompts, groups, [1, 1, None], scores)
    assert scores.labels == ("a, 3 contexts", "b, 2 contexts", "c, 1 contexts")
    # questions are apart: those of two calls join
    one, two = (replace(prompts, items=tuple(prompts[i] for i in own)) for own in ((0, 1, 3), (2, 4, 5)))
    joined = HeadScores.concat([identify.context_entropy(model, part) for part in (one, two)])
    torch.testing.assert_close(joined.per_prompt, scores.per_prompt, atol=1e-4, rtol=0)


def test_mean_spread_and_choice_equal_eager_attention_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    prompts = tasks.contexts(tokenizer, questions=2, each=2, length=130)
    gold = [[prompt.meta["gold"] for prompt in prompts[start : start + 2]].index(True) for start in (0, 2)]
    scores = identify.context_entropy(model, prompts)
    assert_mean_spread_and_choice_equal_eager_attention(model, eager, prompts, [[0, 1], [2, 3]], gold, scores)


def test_without_groups_each_prompt_is_a_question_of_its_own(tiny_model):
    scores = identify.context_entropy(tiny_model("llama"), capture_oracle.prompts((30, 26)))
    assert len(scores.per_prompt) == 2
    assert (scores.extras["spread"] == 0).all()
    assert scores.extras["chosen"].isnan().all()


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_a_head_that_looks_at_one_token_has_the_lowest_entropy_and_not_when_shuffled(family):
    for seed in range(6):
        truth = planted.make("sink", seed, family)
        batch = planted_prompts("sink", seed)
        found = identify.context_entropy(truth.model, batch).values
        assert found[truth.head] < 0.3
        assert int(found.argmin()) == truth.head[0] * planted.HEADS + truth.head[1], seed
        control = planted.make("sink", seed, family, shuffled=True)
        assert identify.context_entropy(control.model, batch)[truth.head] > 0.5, seed


def test_contexts_of_which_one_answers(demo):
    _, tokenizer = demo
    prompts = tasks.contexts(tokenizer, questions=3, each=3, length=190)
    assert [prompt.meta["group"] for prompt in prompts] == ["0/0"] * 3 + ["0/1"] * 3 + ["0/2"] * 3
    for start in range(0, 9, 3):
        own = prompts[start : start + 3]
        assert [prompt.meta["slot"] for prompt in own] == [0, 1, 2]
        assert sum(prompt.meta["gold"] for prompt in own) == 1
        assert len({prompt.meta["question"] for prompt in own}) == 1
        for prompt in own:
            assert (prompt.meta["answer"] in prompt.text) == prompt.meta["gold"]
            assert ("needle" in prompt.spans) == prompt.meta["gold"]
            assert prompt.text.count(prompt.meta["question"]) == 1
            assert 130 < len(prompt) <= 190
        starts = {prompt.ids[prompt.spans["context"][0][0] :][:12] for prompt in own}
        assert len(starts) == 3
    assert tasks.contexts(tokenizer, questions=1, each=3, length=190).items == prompts.items[:3]
    assert tasks.contexts(tokenizer, questions=1, each=3, length=190, seed=1).items != prompts.items[:3]


@pytest.mark.parametrize("given", [{"questions": 0}, {"each": 1}, {"depth": 1.5}])
def test_contexts_refuse(demo, given):
    with pytest.raises(UsageError, match="ask for at least one question with at least 2 contexts"):
        tasks.contexts(demo[1], **given)
