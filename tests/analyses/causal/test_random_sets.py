"""The random sets of every experiment that tests a head set: permutations of the heads of its layers."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import tiny_chat_model

from interp import steer
from interp.analyses import identify, tasks
from interp.analyses.causal.ablation_test import ablation_test
from interp.analyses.causal.causal_profile import causal_profile
from interp.analyses.causal.curve import causal_curve
from interp.analyses.causal.random_sets import KeptSets, RandomSets
from interp.analyses.causal.set_difference import set_difference
from interp.analyses.measures.losses import token_losses
from interp.analyses.results.trials import Trials
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts

N = 20
"""random sets; with two of four heads tested, all of these leave the tested heads out in one of a million cases"""


@cache
def parts() -> tuple[Any, Any, Prompts, dict[str, Any]]:
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    copies = tasks.repeated(tokenizer, n=12, batch=3)
    scores = replace(identify.induction(model, copies), threshold=None)
    return model, scores, copies, {"loss": lambda model: token_losses(model, copies)}


def ablated() -> Trials:
    model, scores, copies, _ = parts()
    return ablation_test(
        model, copies, scores, n_heads=2, n_random_sets=N, right_only=False, judge=lambda reply, prompt: True,
        max_new_tokens=1, stop_early=False,
    )  # fmt: skip


def curve() -> Trials:
    model, scores, _, measures = parts()
    return causal_curve(model, {"made": scores}, measures, sizes=(2,), n_random_sets=N, stop_early=False)


def profile() -> Trials:
    model, scores, _, measures = parts()
    return causal_profile(model, scores, measures, kinds=("zero",), sizes=(2,), n_random_sets=N)


def difference() -> Trials:
    model, scores, copies, _ = parts()
    other = replace(scores, name="flipped", per_prompt=scores.per_prompt.flip(2))
    return set_difference(model, scores, other, neutral=copies, n_heads=2, n_random_sets=N)


def steered() -> Trials:
    model, _, copies, _ = parts()
    edit = steer.Boost("first", 2.0, heads="L0H1 L1H2")
    judge = lambda reply, prompt: True  # noqa: E731
    return steer.steer_check(model, copies, edit, judge=judge, max_new_tokens=1, n_random_sets=N, stop_early=False)


@pytest.mark.parametrize("run", [ablated, curve, profile, difference, steered])
def test_random_sets_permute_the_heads_of_each_layer(run):
    trials = run()
    drawn = [trial for trial in trials.trials if trial.condition == "random by layer"]
    tested = {(name, size): trials.select(name, size)[0].heads for name in trials.tested for size in trials.sizes(name)}
    assert len(drawn) >= N
    for trial in drawn:
        own = tested[trial.matched, trial.size]
        assert sorted(head.layer for head in trial.heads) == sorted(head.layer for head in own)
    # where no set may share a head with the tested one, random heads differ from random heads too often
    assert any(trial.heads & tested[trial.matched, trial.size] for trial in drawn)


@pytest.mark.parametrize("excluded", ["", "L0H1 L1H2", "L0H0 L0H1 L1H2"])
@pytest.mark.parametrize("name", ["made", "other"])
def test_sets_differ_by_draw_and_leave_tested_heads_out_by_chance(excluded, name):
    """The tested heads are drawn like all others, even where the heads of their role are not drawn."""
    tested, layout = HeadSet.parse("L0H1 L1H2"), HeadLayout(2, 8, 2)
    sets = RandomSets(tested, layout, 60, 1, name, HeadSet.parse(excluded) if excluded else HeadSet())
    drawn = [condition.heads for condition in sets.permuted()]
    assert len(set(map(str, drawn))) > 20
    shared = [len(heads & tested) for heads in drawn]
    # of 7 or 8 heads a layer, one is tested
    assert 0.5 < shared.count(0) / len(shared) < 0.95
    assert not any(len(heads & (HeadSet.parse(excluded or tested) - tested)) for heads in drawn)
    free = [condition.heads for condition in sets.free()]
    assert len(set(map(str, free))) == 3
    assert not any(len(heads & tested) for heads in free)


def test_kept_sets_keep_random_heads_of_the_role():
    tested, role = HeadSet.parse("L0H1 L1H2"), HeadSet.parse("L0H0 L0H1 L0H5 L1H2 L1H3 L1H7")
    kept = [role - condition.heads for condition in KeptSets(tested, role, 40).conditions()]
    assert all(len(heads) == 2 for heads in kept)
    assert len(set(map(str, kept))) > 8
    assert {head for heads in kept for head in heads} == set(role)
