"""Pruning curves: which heads go and when, what they are worth on planted and on real weights, and the record."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from capture_oracle import prompts as random_prompts
from detectors import prompts
from tokenizers_tiny import byte_level

from interp.analyses import identify, tasks
from interp.analyses.measures.losses import token_losses
from interp.analyses.pruning import PruningCurve, pruning_curve
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.testing import planted

RISING = torch.arange(8.0).view(1, 2, 4)


def test_lowest_go_first_and_sets_are_nested(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20, 13))
    curve = pruning_curve(model, batch, HeadScores("made", RISING), fractions=(0.0, 0.25, 0.5, 1.0), draws=2)
    assert [str(heads) for heads in curve.pruned[:3]] == ["", "L0H0, L0H1", "L0H0, L0H1, L0H2, L0H3"]
    assert curve.values.shape == (4, 2)
    assert curve.random.shape == (2, 4, 2)
    torch.testing.assert_close(curve.values[0], token_losses(model, batch), atol=1e-6, rtol=0)
    with ablate(model, "L0H0, L0H1", "zero"):
        torch.testing.assert_close(curve.values[1], token_losses(model, batch), atol=1e-6, rtol=0)
    # nothing and everything out are the same in any order
    for number in (0, 3):
        assert (curve.random[:, number] == curve.values[number]).all()
        assert curve.apart(number) == (0.0, 0.0, 0.0)
    assert not torch.equal(curve.random[0], curve.random[1])


def test_layers_keep_what_they_are_to_keep(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20, 13))
    curve = pruning_curve(model, batch, HeadScores("made", RISING), fractions=(0.5, 0.75), keep_per_layer=1, draws=1)
    assert [str(heads) for heads in curve.pruned] == ["L0H0, L0H1, L0H2, L1H0", "L0H0, L0H1, L0H2, L1H0, L1H1, L1H2"]
    with pytest.raises(UsageError, match=r"leaves fewer than 1 in a layer: take fractions up to 0\.75"):
        pruning_curve(model, batch, fractions=(0.9,), keep_per_layer=1)


def test_equal_scores_go_in_a_random_order(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20,))
    table = torch.zeros(1, 2, 4)
    table[0, 0, 0] = 1.0
    drawn = {pruning_curve(model, batch, HeadScores("m", table), fractions=(0.5,), seed=i).pruned[0] for i in range(4)}
    assert len(drawn) > 1
    assert all("L0H0" not in heads for heads in drawn)


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_planted_heads_are_left_to_the_last(family, recompute):
    for seed in range(3):
        truth = planted.make("induction", seed, family)
        scores = identify.gradient_importance(truth.model, prompts("induction", seed + 50), normalize=None)
        needed = HeadSet.parse([head for head in (truth.head, truth.helper) if head is not None])
        curve = pruning_curve(
            truth.model, prompts("induction", seed), scores, fractions=(0.0, 0.5, 0.75), recompute=recompute
        )
        assert not needed & curve.pruned[-1], f"seed {seed}"
        assert curve.point(2)[0] < curve.point(0)[0] + 0.5, f"seed {seed}: {curve}"
        assert curve.apart(2)[1] > 1.0, f"seed {seed}: {curve}"


def test_recomputing_goes_by_what_is_left(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20, 13))
    curve = pruning_curve(model, batch, fractions=(0.25, 0.5, 0.75), recompute=True, draws=1)
    assert curve.name == "gradient_importance"
    for less, more in zip(curve.pruned, curve.pruned[1:], strict=False):
        assert not less - more
        with ablate(model, less, "zero"):
            values = identify.gradient_importance(model, batch).values
        rest = sorted(HeadLayout.of(model).all() - less, key=lambda head: float(values[head]))
        assert more == less | HeadSet(tuple(rest[:2]))


def test_accuracy_by_a_judge_and_a_loss_of_ones_own(tiny_model):
    truth, tokenizer = planted.make("retrieval", 3, "llama"), byte_level()
    batch = replace(prompts("retrieval", 3), tokenizer=tokenizer)
    table = torch.ones(1, 3, 4)
    for layer, head in HeadSet.parse([head for head in (truth.head, truth.helper) if head is not None]):
        table[0, layer, head] = 0.0

    def judge(reply, prompt):
        return reply == tokenizer.decode(prompt.meta["answer_ids"])

    needed_first = pruning_curve(
        truth.model, batch, HeadScores("made", table), fractions=(0.0, 2 / 12), judge=judge, draws=1, kind="uniform"
    )
    assert needed_first.unit == "accuracy"
    assert needed_first.values.tolist() == [[1.0] * 4, [0.0] * 4]
    needed_last = pruning_curve(truth.model, batch, HeadScores("made", -table), fractions=(0.75,), judge=judge, draws=1)
    assert needed_last.values.tolist() == [[1.0] * 4]
    rows = random_prompts((20, 13))
    own = pruning_curve(tiny_model("llama"), rows, fractions=(0.0,), loss=lambda logits, batch: logits[:, -1, 5])
    assert own.unit == "loss"
    assert own.values.shape == (1, 2)


def test_a_reference_reaches_the_ablation(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20, 13))
    curve = pruning_curve(model, batch, recompute=True, fractions=(0.25, 0.5), kind="mean", reference=batch, draws=1)
    with ablate(model, curve.pruned[1], "mean", reference=batch):
        torch.testing.assert_close(curve.values[1], token_losses(model, batch), atol=1e-6, rtol=0)


def test_the_record_is_whole():
    values = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    curve = PruningCurve(
        "made", (0.0, 0.5), (HeadSet(()), HeadSet.parse("L0H1")), values, values[None] + 1, "x", "zero"
    )
    told = curve.to_dict()
    assert pickle.loads(pickle.dumps(curve)).to_dict() == told
    assert json.loads(json.dumps(told))["points"][1]["heads"] == ["L0H1"]
    assert curve.point(1)[0] == 3.0
    assert curve.point(1, random=True)[0] == 4.0
    assert curve.apart(1) == (1.0, 1.0, 1.0)
    lines = str(curve).splitlines()
    assert len(lines) == 3
    assert lines[2].split()[:3] == ["50%", "1", "3.000"]


def test_what_is_wrong_is_said(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20,))
    for fractions in ((), (0.5, 0.1), (0.1, 0.1), (-0.1,), (0.5, 1.1)):
        with pytest.raises(UsageError, match="shares of heads from 0 to 1 that rise"):
            pruning_curve(model, batch, fractions=fractions)
    with pytest.raises(UsageError, match="at least one draw"):
        pruning_curve(model, batch, draws=0)
    with pytest.raises(UsageError, match="give 0 to 4"):
        pruning_curve(model, batch, keep_per_layer=5)
    with pytest.raises(ScoreError, match="have 3x4 heads, the model 2x4"):
        pruning_curve(model, batch, HeadScores("made", torch.zeros(1, 3, 4)))
    with pytest.raises(UsageError, match="heads without a score"):
        pruning_curve(model, batch, HeadScores("made", torch.full((1, 2, 4), torch.nan)))


@pytest.mark.slow
def test_unimportant_heads_of_the_demo_model_can_go(demo):
    model, tokenizer = demo
    scores = identify.gradient_importance(model, tasks.repeated(tokenizer, n=50, batch=8, seed=0))
    curve = pruning_curve(model, tasks.repeated(tokenizer, n=50, batch=8, seed=1), scores, fractions=(0.0, 0.1))
    assert curve.point(1)[0] < curve.point(0)[0] + 0.4, curve
    assert curve.apart(1)[1] > 1.5, curve
