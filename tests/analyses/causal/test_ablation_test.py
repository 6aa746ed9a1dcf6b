"""The causal check: the conditions it compares, its intervals, and what it finds on planted and on real weights."""

import pytest
import torch
from detectors import prompts

from interp.analyses import identify, tasks
from interp.analyses.causal.ablation_test import CausalCheck, Condition, Outcome, ablation_test, conditions
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.generate import generate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.testing import planted

LAYOUT = HeadLayout(6, 4, 2)


def test_random_heads_leave_the_top_out_and_match_layers():
    top = HeadSet.parse("L4H0, L4H2, L5H1")
    named = conditions(top, LAYOUT, draws=3, seed=1)
    assert [c.group for c in named] == ["as loaded", "top", *["random"] * 3, *["random by layer"] * 3]
    for condition in named[2:]:
        assert len(condition.heads) == 3
        assert not condition.heads & top
    for condition in named[5:]:
        assert sorted(head.layer for head in condition.heads) == [4, 4, 5]
    assert len({c.heads for c in named[2:5]}) > 1
    with pytest.raises(UsageError, match="at least one draw"):
        conditions(top, LAYOUT, draws=0)
    with pytest.raises(UsageError, match="no heads to take out"):
        conditions(HeadSet(()), LAYOUT)


def test_heads_without_a_score_are_never_the_top():
    table = torch.zeros(2, 6, 4)
    table[:, 2, 1] = 0.5
    assert HeadScores("made", table).heads(top=5, above=0.0) == HeadSet.parse("L2H1")


def test_intervals_are_over_draws_and_prompts():
    def outcome(group, verdicts):
        return Outcome(Condition(group, group, HeadSet(())), verdicts, ("",) * len(verdicts))

    sure, unsure = (True,) * 8, (True, False) * 4
    check = CausalCheck((outcome("top", (False,) * 8), outcome("random", sure), outcome("random", unsure)), "zero", 1)
    assert check.group("top") == (0.0, 0.0, 0.0)
    mean, low, high = check.group("random")
    assert mean == 0.75
    assert low <= 0.5
    assert high == 1.0
    assert check.group("random") == (mean, low, high)
    assert "random" in str(check)
    with pytest.raises(UsageError, match="is not in this check"):
        check.group("none")


@pytest.mark.parametrize("kind", ["zero", "mean", "uniform"])
def test_the_planted_head_is_needed_and_others_are_not(kind):
    truth = planted.make("retrieval", 3, "llama")
    batch = prompts("retrieval", 3)
    # its helper writes what the planted head matches: it is needed too
    top = HeadSet.parse([head for head in (truth.head, truth.helper) if head is not None])
    wanted = [tuple(prompt.meta["answer_ids"]) for prompt in batch]

    def answered(heads):
        with ablate(truth.model, heads, kind, reference=prompts("retrieval", 9) if kind == "mean" else None):
            return [reply.ids == ids for reply, ids in zip(generate(truth.model, batch), wanted, strict=True)]

    assert all(answered(HeadSet(())))
    assert not any(answered(top))
    for seed in range(3):
        assert all(answered(top.random_like(HeadLayout.of(truth.model), seed)))


def test_a_reference_reaches_the_ablation(demo):
    model, tokenizer = demo
    batch = tasks.needle(tokenizer, lengths=(180,), n=1, seed=3)
    heads = HeadSet.parse("L18H6, L17H3")
    check = ablation_test(model, batch, heads, kind="mean", reference=batch, draws=1, max_new_tokens=2)
    assert check.kind == "mean"
    assert len(check.outcomes) == 4


@pytest.mark.slow
def test_retrieval_heads_of_the_demo_model_are_needed(demo):
    model, tokenizer = demo
    scores = identify.retrieval(model, tasks.needle(tokenizer, lengths=(256,), n=12, seed=1))
    check = ablation_test(model, tasks.needle(tokenizer, lengths=(200,), n=12, seed=2), scores, draws=2)
    assert check.group("as loaded")[0] >= 0.9
    assert check.group("top")[0] <= 0.1
    assert check.group("random")[0] >= 0.8
    # heads of the same layers do matter some, but the chosen ones are the ones
    assert check.group("random by layer")[0] >= 0.4
