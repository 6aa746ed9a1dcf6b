"""Pruning curves: the order of the heads, the losses on planted and on real weights, and what is stored."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from capture_oracle import prompts as random_prompts
from detectors import prompts
from tokenizers_tiny import byte_level

from interp.analyses import identify, pruning, tasks
from interp.analyses.measures.losses import token_losses
from interp.analyses.pruning import OWN_PROMPTS, pruning_curve
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trials import Trials
from interp.errors import ScoreError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.testing import planted

RISING = torch.arange(8.0).view(1, 2, 4)


def pruned(curve):
    """The ablated heads at each fraction, in the order of the scores."""
    return [trial.heads for trial in curve.trials if trial.condition == curve.name]


def values(curve, condition=None, draw=0):
    """Numbers [f p] of the scores, or of one random order."""
    trials = [t for t in curve.trials if t.condition == (condition or curve.name) and t.draw == draw]
    return torch.tensor([trial.values[curve.measures[0]] for trial in trials])


def random_minus_scores(curve, size):
    return curve.gain("random", size=size, over=curve.name)


def test_lowest_go_first_and_sets_are_nested(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20, 13))
    curve = pruning_curve(model, batch, HeadScores("made", RISING), fractions=(0.0, 0.25, 0.5, 1.0), n_random_sets=2)
    assert [str(heads) if len(heads) else "" for heads in pruned(curve)[:3]] == [
        "",
        "L0H0, L0H1",
        "L0H0, L0H1, L0H2, L0H3",
    ]
    assert values(curve).shape == values(curve, "random", 1).shape == (4, 2)
    assert curve.sizes("made") == curve.sizes("random") == (0.0, 0.25, 0.5, 1.0)
    assert not curve.notes
    torch.testing.assert_close(values(curve)[0], token_losses(model, batch), atol=1e-6, rtol=0)
    with ablate(model, "L0H0, L0H1", "zero"):
        torch.testing.assert_close(values(curve)[1], token_losses(model, batch), atol=1e-6, rtol=0)
    # no heads and all heads are the same set in any order
    for number, size in ((0, 0.0), (3, 1.0)):
        for draw in (0, 1):
            assert torch.equal(values(curve, "random", draw)[number], values(curve)[number])
        assert random_minus_scores(curve, size).mean == 0.0
    assert not torch.equal(values(curve, "random", 0), values(curve, "random", 1))


def test_the_depth_profile_is_a_baseline_order(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20, 13))
    # the first layer has the higher mean, and the lowest head
    table = torch.tensor([[[0.0, 9.0, 9.0, 9.0], [1.0, 2.0, 3.0, 4.0]]])
    curve = pruning_curve(model, batch, HeadScores("made", table), fractions=(0.0, 0.5, 0.75), n_random_sets=1)
    assert curve.tested == ("made", "made by depth")
    half, more = (curve.select("made by depth", size)[0].heads for size in (0.5, 0.75))
    assert half == HeadSet.parse("L1H0-L1H3")
    assert len(more) == 6
    assert half & more == half
    with ablate(model, half, "zero"):
        expected = token_losses(model, batch)
    torch.testing.assert_close(values(curve, "made by depth")[1], expected, atol=1e-6, rtol=0)
    assert not [n for n in pruning_curve(model, batch, HeadScores("m", table), depth=False).tested if "depth" in n]


def test_every_layer_keeps_its_share(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20, 13))
    curve = pruning_curve(
        model, batch, HeadScores("made", RISING), fractions=(0.5, 0.75), keep_per_layer=1, n_random_sets=1
    )
    assert [str(heads) for heads in pruned(curve)] == ["L0H0, L0H1, L0H2, L1H0", "L0H0, L0H1, L0H2, L1H0, L1H1, L1H2"]
    with pytest.raises(UsageError, match=r"leave fewer than 1 in a layer; give fractions up to 0\.75"):
        pruning_curve(model, batch, fractions=(0.9,), keep_per_layer=1)


def test_equal_scores_go_in_a_random_order(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20,))
    table = torch.zeros(1, 2, 4)
    table[0, 0, 0] = 1.0
    made = HeadScores("m", table)
    drawn = {pruned(pruning_curve(model, batch, made, fractions=(0.5,), seed=i))[0] for i in range(4)}
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
            truth.model, prompts("induction", seed), scores, fractions=(0.0, 0.5, 0.75), recompute=recompute,
            n_random_sets=39,
        )  # fmt: skip
        assert not needed & pruned(curve)[-1], f"seed {seed}"
        rise = curve.mean(curve.name, size=0.75).mean - curve.mean(curve.name, size=0.0).mean
        assert rise < 0.5, f"seed {seed}: {curve}"
        test = curve.set_test(curve.name, size=0.75)
        assert test is not None
        assert test.difference < -1.0, f"seed {seed}: {curve}"
        # an order of twelve heads keeps both planted ones among its last three in 1 of 22 draws
        assert test.p_value <= 0.125, f"seed {seed}: {curve}"


def test_recomputing_ranks_the_heads_that_are_left(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20, 13))
    curve = pruning_curve(model, batch, fractions=(0.25, 0.5, 0.75), recompute=True, n_random_sets=1)
    assert curve.name == "gradient_importance"
    assert curve.notes == (OWN_PROMPTS,)
    for less, more in pairwise(pruned(curve)):
        assert not less - more
        with ablate(model, less, "zero"):
            left = identify.gradient_importance(model, batch).values
        rest = sorted(HeadLayout.of(model).all() - less, key=lambda head: float(left[head]))
        assert more == less | HeadSet(tuple(rest[:2]))


def test_a_judge_and_a_custom_loss(tiny_model):
    truth, tokenizer = planted.make("retrieval", 3, "llama"), byte_level()
    batch = replace(prompts("retrieval", 3), tokenizer=tokenizer)
    table = torch.ones(1, 3, 4)
    for layer, head in HeadSet.parse([head for head in (truth.head, truth.helper) if head is not None]):
        table[0, layer, head] = 0.0

    def judge(reply, prompt):
        return reply == tokenizer.decode(prompt.meta["answer_ids"])

    needed_first = pruning_curve(
        truth.model,
        batch,
        HeadScores("made", table),
        fractions=(0.0, 2 / 12),
        judge=judge,
        n_random_sets=1,
        ablation="uniform",
    )
    assert needed_first.measures == needed_first.shares == ("accuracy",)
    assert values(needed_first).tolist() == [[1.0] * 4, [0.0] * 4]
    needed_last = pruning_curve(
        truth.model, batch, HeadScores("made", -table), fractions=(0.75,), judge=judge, n_random_sets=1
    )
    assert values(needed_last).tolist() == [[1.0] * 4]
    rows = random_prompts((20, 13))
    own = pruning_curve(tiny_model("llama"), rows, fractions=(0.0,), loss=lambda logits, batch: logits[:, -1, 5])
    assert own.measures == ("loss",)
    # a custom loss has no unit
    assert own.units == {}
    assert values(own).shape == (1, 2)


def test_a_reference_reaches_the_ablation(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20, 13))
    settings = {"ablation": "mean", "reference": batch, "n_random_sets": 1}
    curve = pruning_curve(model, batch, recompute=True, fractions=(0.25, 0.5), **settings)
    with ablate(model, pruned(curve)[1], "mean", reference=batch):
        torch.testing.assert_close(values(curve)[1], token_losses(model, batch), atol=1e-6, rtol=0)


def test_it_is_stored_and_resumed(tiny_model, tmp_path, monkeypatch):
    model, batch = tiny_model("llama"), random_prompts((20, 13))
    settings = {"fractions": (0.0, 0.25, 0.5), "n_random_sets": 2}
    curve = pruning_curve(model, batch, HeadScores("made", RISING), **settings)
    again = Trials.load(curve.save(tmp_path / "curve"))
    assert again.trials == curve.trials
    assert again.mean("random", size=0.5) == curve.mean("random", size=0.5)
    lines = str(curve).splitlines()
    assert len(lines) == 9
    assert lines[1].split()[:3] == ["made", "25%", "loss"]
    # killed after each head set in turn, it measures every set once and gives the same numbers
    measure, measured = pruning.token_losses, []

    def stopping(*rest, **settings):
        if len(measured) % 2:
            measured.append(None)
            raise KeyboardInterrupt
        measured.append(measure(*rest, **settings))
        return measured[-1]

    monkeypatch.setattr(pruning, "token_losses", stopping)
    while True:
        try:
            found = pruning_curve(model, batch, HeadScores("made", RISING), folder=tmp_path / "parts", **settings)
            break
        except KeyboardInterrupt:
            assert len(measured) < 20
    assert found.trials == curve.trials
    assert len([one for one in measured if one is not None]) == len({trial.heads for trial in curve.trials})


def test_bad_input(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20,))
    for fractions in ((), (0.5, 0.1), (0.1, 0.1), (-0.1,), (0.5, 1.1)):
        with pytest.raises(UsageError, match="give shares of heads from 0 to 1 that rise"):
            pruning_curve(model, batch, fractions=fractions)
    with pytest.raises(UsageError, match="at least 1 random order"):
        pruning_curve(model, batch, n_random_sets=0)
    with pytest.raises(UsageError, match="give 0 to 4"):
        pruning_curve(model, batch, keep_per_layer=5)
    with pytest.raises(ScoreError, match="have 3x4 heads and the model has 2x4"):
        pruning_curve(model, batch, HeadScores("made", torch.zeros(1, 3, 4)))
    with pytest.raises(UsageError, match="heads without a score"):
        pruning_curve(model, batch, HeadScores("made", torch.full((1, 2, 4), torch.nan)))


@pytest.mark.slow
def test_unimportant_heads_of_the_demo_model_can_go(demo):
    model, tokenizer = demo
    scores = identify.gradient_importance(model, tasks.repeated(tokenizer, n=50, batch=8, seed=0))
    others = tasks.repeated(tokenizer, n=50, batch=8, seed=1)
    curve = pruning_curve(model, others, scores, fractions=(0.0, 0.1), n_random_sets=39)
    assert curve.mean(curve.name, size=0.1).mean < curve.mean(curve.name, size=0.0).mean + 0.4, curve
    assert random_minus_scores(curve, 0.1).low > 1.5, curve
    test = curve.set_test(curve.name, size=0.1)
    assert test is not None
    assert test.is_beyond, curve
