"""Ablation tests: the conditions, the intervals, and planted and real heads that a task needs."""

from dataclasses import replace
from typing import Any

import pytest
import tiny_chat_model
import torch
from detectors import prompts

from interp.analyses import identify, tasks
from interp.analyses.causal.ablated_measures import replies_to
from interp.analyses.causal.ablation_test import ablation_test
from interp.analyses.causal.random_sets import FROM_OTHER_LAYERS, RandomSets, excluded
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trial import OF_TESTED_SET, Trial
from interp.analyses.results.trials import Trials
from interp.analyses.tasks.needle import judge
from interp.errors import UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.generate import generate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.testing import planted

LAYOUT = HeadLayout(6, 4, 2)


def test_random_heads_leave_the_top_out_and_match_layers():
    top = HeadSet.parse("L4H0, L4H2, L5H1")
    sets = RandomSets(top, LAYOUT, 12, seed=1, name="made", exclude=HeadSet.parse("L0H0"))
    free, by_layer = sets.free(), list(sets.by_layer())
    assert [condition.name for condition in (free[0], by_layer[0])] == ["random", "random by layer"]
    assert (len(free), len(by_layer)) == (3, 12)
    assert [condition.draw for condition in by_layer] == list(range(12))
    for condition in (*free, *by_layer):
        assert len(condition.heads) == 3
        assert not condition.heads & (top | HeadSet.parse("L0H0"))
    for condition in by_layer:
        assert sorted(head.layer for head in condition.heads) == [4, 4, 5]
        assert not condition.facts
    assert len({condition.heads for condition in free}) > 1
    with pytest.raises(UsageError, match="at least 1 set of random heads"):
        RandomSets(top, LAYOUT, 0)
    with pytest.raises(UsageError, match="no heads to ablate"):
        RandomSets(HeadSet(()), LAYOUT, 3)


def test_the_sets_of_a_test_permute_all_heads_of_each_layer():
    top, never = HeadSet.parse("L4H0, L4H2, L5H1"), HeadSet.parse("L5H2")
    sets = list(RandomSets(top, LAYOUT, 400, seed=1, name="made", exclude=never | top).permuted())
    assert {condition.name for condition in sets} == {"random by layer"}
    drawn = [condition.heads for condition in sets]
    assert all([head.layer for head in heads] == [4, 4, 5] for heads in drawn)
    assert not any(heads & never for heads in drawn)
    assert [condition.facts for condition in sets] == [
        {OF_TESTED_SET: len(heads & top)} if heads & top else {} for heads in drawn
    ]
    # six pairs of the four heads of layer 4, times three heads of layer 5, each as often
    assert len(set(drawn)) == 18
    assert 8 < drawn.count(top) < 45
    # a single head is one of the four of its layer, so it is never beyond 39 sets
    alone = RandomSets(HeadSet.parse("L4H0"), LAYOUT, 39, seed=1, name="made")
    assert any(condition.heads == HeadSet.parse("L4H0") for condition in alone.permuted())


@pytest.mark.parametrize(
    ("top", "exclude", "drawn"),
    [
        # two tested heads, one excluded and one other: three heads would give three sets, two thirds of each tested
        ("L4H0, L4H1", "L4H2", {"L4H0", "L4H1", "L4H2", "L4H3"}),
        ("L4H0, L4H1", "L4H2, L4H3", {"L4H0", "L4H1", "L4H2", "L4H3"}),
        # one tested head and two others: the excluded one stays out
        ("L4H0", "L4H2", {"L4H0", "L4H1", "L4H3"}),
        # each layer by itself
        ("L4H0, L4H1, L5H0", "L4H2, L5H3", {"L4H0", "L4H1", "L4H2", "L4H3", "L5H0", "L5H1", "L5H2"}),
    ],
)
def test_a_layer_with_too_few_other_heads_draws_the_excluded_ones(top, exclude, drawn):
    sets = RandomSets(HeadSet.parse(top), LAYOUT, 200, name="made", exclude=HeadSet.parse(exclude))
    found = {str(head) for condition in sets.permuted() for head in condition.heads}
    assert found == drawn


def test_draws_repeat_for_a_seed_and_differ_between_names_and_sets():
    top, other = HeadSet.parse("L1H0, L2H1"), HeadSet.parse("L1H0, L2H2")
    drawn = {
        key: tuple(condition.heads for condition in RandomSets(heads, LAYOUT, 6, seed, name).by_layer())
        for key, (heads, seed, name) in {
            "one": (top, 0, "a"), "seed": (top, 1, "a"), "name": (top, 0, "b"), "heads": (other, 0, "a"),
        }.items()
    }  # fmt: skip
    assert drawn["one"] == tuple(condition.heads for condition in RandomSets(top, LAYOUT, 6, 0, "a").by_layer())
    assert len(set(drawn.values())) == len(drawn)


def test_heads_that_a_layer_could_not_provide_are_counted():
    top = HeadSet.parse("L4H0, L4H1, L4H2")
    for condition in RandomSets(top, LAYOUT, 3).by_layer():
        assert len(condition.heads) == 3
        assert condition.facts == {FROM_OTHER_LAYERS: 2}
        assert {head.layer for head in condition.heads} <= {3, 4, 5}


def test_heads_above_the_threshold_are_no_control_while_enough_are_left():
    table = torch.zeros(2, 6, 4)
    table[:, 2] = 0.5
    scores = HeadScores("made", table, threshold=0.1)
    top = HeadSet.parse("L2H0, L2H1")
    assert excluded(scores, top) == HeadSet.parse("L2H0, L2H1, L2H2, L2H3")
    assert excluded(replace(scores, threshold=-1.0), top) == HeadSet(())
    assert excluded(replace(scores, threshold=None), top) == HeadSet(())
    # a head below 0.6 is left for each of 24, of which the tested ones are no control
    assert len(excluded(replace(scores, threshold=0.2), HeadSet.parse("L2, L3, L4", scores.layout))) == 0


def test_draws_end_when_no_further_set_changes_the_verdict():
    def measure(condition):
        return Trial(condition.name, {"loss": (float(condition.draw % 2),)}, condition.heads, 2, condition.draw)

    sets = RandomSets(HeadSet.parse("L1H0, L2H1"), LAYOUT, 99, name="made")
    # every second set is as extreme as the tested one: the fifth of them is the tenth set
    base, one, two = (Trial("made", {"loss": (value,)}) for value in (0.0, 1.0, 2.0))
    early = [trial for trial in sets.run(measure, base, one) if trial.condition == "random by layer"]
    assert len(early) == 10
    assert {trial.matched for trial in early} == {"made"}
    # no set is as extreme: one look after 39 sets, except among several tests
    for is_single, expected in ((True, 39), (False, 99)):
        drawn = replace(sets, is_single=is_single).run(measure, base, two)
        assert len([trial for trial in drawn if trial.condition == "random by layer"]) == expected


def test_heads_without_a_score_are_never_the_top():
    table = torch.zeros(2, 6, 4)
    table[:, 2, 1] = 0.5
    assert HeadScores("made", table).heads(top=5, above=0.0) == HeadSet.parse("L2H1")


def test_intervals_are_over_draws_and_prompts():
    def trial(condition, verdicts, draw=0):
        return Trial(condition, {"accuracy": verdicts}, draw=draw)

    sure, unsure = (1.0,) * 8, (1.0, 0.0) * 4
    trials = Trials("made", (trial("top", (0.0,) * 8), trial("random", sure), trial("random", unsure, 1)))
    assert trials.mean("top").mean == 0.0
    mean, low, high = trials.mean("random")
    assert mean == 0.75
    assert low <= 0.5
    assert high == 1.0
    assert trials.mean("random") == (mean, low, high)
    assert "random" in str(trials)
    with pytest.raises(UsageError, match="unknown condition 'none'; choose from 'top', 'random'"):
        trials.mean("none")


@pytest.mark.parametrize("ablation", ["zero", "mean", "uniform"])
def test_the_planted_head_is_needed_and_others_are_not(ablation):
    truth = planted.make("retrieval", 3, "llama")
    batch = prompts("retrieval", 3)
    # its helper writes what the planted head matches: it is needed too
    top = HeadSet.parse([head for head in (truth.head, truth.helper) if head is not None])
    wanted = [tuple(prompt.meta["answer_ids"]) for prompt in batch]

    def answered(heads):
        with ablate(truth.model, heads, ablation, reference=prompts("retrieval", 9) if ablation == "mean" else None):
            return [reply.ids == ids for reply, ids in zip(generate(truth.model, batch), wanted, strict=True)]

    assert all(answered(HeadSet(())))
    assert not any(answered(top))
    for seed in range(3):
        assert all(answered(top.random_like(HeadLayout.of(truth.model), seed)))


def test_a_reference_reaches_the_ablation(demo):
    model, tokenizer = demo
    batch = tasks.needle(tokenizer, lengths=(180,), n=1, seed=3)
    heads = HeadSet.parse("L18H6, L17H3")
    settings: dict[str, Any] = {"n_random_sets": 1, "max_new_tokens": 2, "right_only": False}
    trials = ablation_test(model, batch, heads, ablation="mean", reference=batch, **settings)
    assert trials.intervention == trials.settings["ablation"] == "mean"
    # the ablation of the test is not one of the others
    assert trials.conditions == ("baseline", "top", "top (zero)", "top (resample)", "random", "random by layer")
    assert trials.settings["kinds"] == ["zero", "resample"]
    assert trials.select("top")[0].heads == heads
    assert trials.answers == tuple(prompt.meta["answer"] for prompt in batch)


def test_replies_are_judged_and_kept(tmp_path):
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    batch = tasks.needle(tokenizer, lengths=(560,), n=3, seed=3)
    heads = HeadSet.parse("L0H1, L1H2")
    settings: dict[str, Any] = {"n_random_sets": 2, "max_new_tokens": 3, "judge": even, "right_only": False}
    trials = ablation_test(model, batch, heads, **settings)
    assert (trials.name, trials.measures, trials.shares) == ("heads", ("accuracy",), ("accuracy",))
    for trial in trials.trials:
        assert trial.size == len(trial.heads)
        assert trial.values["accuracy"] == tuple(float(even(reply, None)) for reply in trial.replies)
    with ablate(model, heads, "zero"):
        assert list(trials.select("top")[0].replies) == [
            reply.text for reply in generate(model, batch, max_new_tokens=3, stop="\n")
        ]
    kept = ablation_test(model, batch, heads, folder=tmp_path, **settings)
    assert [trial.values for trial in kept.trials] == [trial.values for trial in trials.trials]
    # conditions of another judge or another length are not read from the folder
    n_files = len(list(tmp_path.iterdir()))
    # the tested heads under two more ablations
    assert n_files == len({trial.heads for trial in trials.trials}) + 2
    ablation_test(model, batch, heads, folder=tmp_path, **dict[str, Any](settings, judge=odd))
    ablation_test(model, batch, heads, folder=tmp_path, **dict[str, Any](settings, max_new_tokens=2))
    assert len(list(tmp_path.iterdir())) == 3 * n_files


def even(reply, prompt):
    return len(reply) % 2 == 0


def odd(reply, prompt):
    return len(reply) % 2 == 1


@pytest.mark.slow
def test_retrieval_heads_of_the_demo_model_are_needed(demo):
    model, tokenizer = demo
    scores = identify.retrieval(model, tasks.needle(tokenizer, lengths=(256,), n=12, seed=1))
    trials = ablation_test(model, tasks.needle(tokenizer, lengths=(200,), n=12, seed=2), scores, n_random_sets=2)
    assert trials.mean("baseline").mean >= 0.9
    assert trials.mean("top").mean <= 0.1
    assert trials.mean("random").mean >= 0.8
    # heads of the same layers do matter some, but the chosen ones are the ones
    assert trials.mean("random by layer").mean >= 0.4


def test_a_reply_ends_once_the_verdict_of_the_default_judge_is_certain():
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    batch = tasks.needle(tokenizer, lengths=(560,), n=4, seed=3)
    whole = replies_to(model, batch, 24, 4)
    # an answer without content words is right from the first token on
    items = [
        replace(prompt, meta={**prompt.meta, "answer": "the" if i else "missing"}) for i, prompt in enumerate(batch)
    ]
    asked = replace(batch, items=tuple(items))
    short = replies_to(model, asked, 24, 4, judge)
    for reply, full, prompt in zip(short, whole, asked, strict=True):
        assert full.ids[: len(reply.ids)] == reply.ids
        assert judge(reply.text, prompt) == judge(full.text, prompt)
    assert short[0] == whole[0]
    assert [len(reply.ids) for reply in short[1:]] == [1, 1, 1]
    # another judge may change its verdict later, and sees the whole reply
    assert replies_to(model, asked, 24, 4, lambda reply, prompt: True) == whole
    trials = ablation_test(
        model, asked, HeadSet.parse("L0H1"), n_random_sets=1, max_new_tokens=24, batch_size=4, right_only=False
    )
    assert trials.select("baseline")[0].replies == tuple(reply.text for reply in short)
