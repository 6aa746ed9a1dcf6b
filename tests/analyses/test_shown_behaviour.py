"""A model that cannot do a task: every method that needs a behaviour counts no item and says nothing about heads."""

from dataclasses import replace
from typing import Any

import pytest
import tiny_chat_model
import torch

from interp.analyses import identify, registry, tasks
from interp.analyses.causal import ablation_test as ablation_tests
from interp.analyses.causal import controls
from interp.analyses.causal.ablated_measures import accuracy
from interp.analyses.causal.causal_profile import causal_profile
from interp.analyses.causal.control_profile import control_profile
from interp.analyses.causal.curve import causal_curve
from interp.analyses.measures.answer_logits import logit_differences
from interp.analyses.measures.refusals import check_contrast, refusals, reply_to_requests
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.shown_behaviour import n_items, sentences_of_counted
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts
from interp.report.trials_words import trials_words
from interp.report.words import summary

NOTHING = "so nothing is stated about heads."
FEW: dict[str, Any] = {"n_heads": 2, "n_random_sets": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def unable():
    """A model whose logits are all 0: it prefers no answer, and repeats one token."""
    model = tiny_chat_model.model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model, tiny_chat_model.tokenizer()


@pytest.fixture(scope="module")
def scores(unable):
    model, tokenizer = unable
    return identify.induction(model, tasks.repeated(tokenizer, n=12, batch=3))


def needles(tokenizer, kind: Any = "literal", needles=1):
    return tasks.needle(tokenizer, lengths=(700,), n=2, kind=kind, needles=needles)


def pairs(tokenizer):
    answers = {"right": ["x"], "wrong": ["y"]}
    return [
        Prompts.encode(tokenizer, [{"text": text, "meta": answers}] * 2) for text in ("x y x", "x y y")
    ]  # fmt: skip


def choices(tokenizer):
    item = {"text": "A. red; B. blue; Answer:", "spans": {"options": ["A. red;", "B. blue;"]},
            "meta": {"option": 1, "right": [" B"], "wrong": [" A"]}}  # fmt: skip
    return Prompts.encode(tokenizer, [item] * 2)


def requests(tokenizer):
    return tasks.refusal.requests(tokenizer, "harmful", 3)


SCORED: dict[str, Any] = {
    "retrieval": lambda m, t: identify.retrieval(m, needles(t), max_new_tokens=3),
    "semantic_retrieval": lambda m, t: identify.semantic_retrieval(m, needles(t), max_new_tokens=3),
    "retrieval_reasoning": lambda m, t: identify.retrieval_reasoning(m, needles(t, "inferred", 3), max_new_tokens=3),
    "function_vectors": lambda m, t: identify.function_vectors(
        m, *(tasks.relations(t, n=2, shots=2, shuffled=mixed) for mixed in (False, True))
    ),
    "qk_score": lambda m, t: identify.qk_score(m, choices(t)),
    "concept_induction": lambda m, t: identify.concept_induction(m, tasks.entities(t, n=2)),
    "activation_patching": lambda m, t: identify.activation_patching(m, *pairs(t)),
    "attribution_patching": lambda m, t: identify.attribution_patching(m, *pairs(t)),
    "path_patching": lambda m, t: identify.path_patching(m, *pairs(t)),
    "logit_attribution": lambda m, t: identify.logit_attribution(m, pairs(t)[0]),
    "ships": lambda m, t: identify.ships(m, requests(t), max_new_tokens=3),
}
TESTED: dict[str, Any] = {
    "ablation_test": lambda m, t, s: ablation_tests.ablation_test(
        m, needles(t), s, n_heads=2, n_random_sets=1, max_new_tokens=3
    ),
    "answers": lambda m, t, s: controls.Answers(3)(m, needles(t), s, **FEW),
    "logit difference": lambda m, t, s: controls.logit_difference()(m, pairs(t)[0], s, **FEW),
    "profile of answers": lambda m, t, s: control_profile(
        controls.Answers(3), m, needles(t), s, kinds=("zero",), **FEW
    ),
    "profile of logits": lambda m, t, s: control_profile(
        controls.logit_difference(), m, pairs(t)[0], s, kinds=("zero",), **FEW
    ),
    "curve of answers": lambda m, t, s: causal_curve(
        m, {"a": s}, {"accuracy": accuracy(needles(t), max_new_tokens=3)}, shown={"accuracy": 0.5}, sizes=(1,),
        n_random_sets=1,
    ),
    "curve of refusals": lambda m, t, s: causal_curve(
        m, {"a": s}, {"refused": refusals(requests(t), max_new_tokens=3)}, shown={"refused": 0.5}, sizes=(1,),
        n_random_sets=1,
    ),
    "profile": lambda m, t, s: causal_profile(
        m, s, {"logits": lambda model: logit_differences(model, pairs(t)[0])}, shown={"logits": 0.0}, sizes=(1,),
        kinds=("zero",), n_random_sets=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORED)
def test_no_head_is_ranked_where_the_model_shows_nothing(unable, name):
    table = SCORED[name](*unable)
    assert isinstance(table, HeadScores)
    assert (table.counted, table.n_scored, table.top(5)) == (0, 0, [])
    assert "L0H" not in table.summary()
    assert "No prompt could be used, so no head has a score." in summary(table, 0.1).found


@pytest.mark.parametrize("name", TESTED)
def test_no_head_is_ablated_where_the_model_shows_nothing(unable, scores, name):
    trials = TESTED[name](*unable, scores)
    assert trials.conditions == ("baseline",)
    ((shown, n),) = trials.settings["counted"].values()
    assert (shown, n) == (0, len(trials.trials[0].values[trials.measures[0]]))
    words = trials_words(trials)
    assert NOTHING in " ".join(words[:2])
    assert NOTHING in trials.summary().splitlines()[0]
    assert not trials.tested


def test_refusals_of_a_model_that_refuses_nothing_are_refused(unable):
    model, tokenizer = unable
    with pytest.raises(UsageError, match="0 prompts that the model refuses, of 3"):
        identify.sahara(model, requests(tokenizer), max_new_tokens=3)
    replies = reply_to_requests(model, requests(tokenizer), max_new_tokens=3)
    with pytest.raises(UsageError, match="refuses 0 of 3 harmful"):
        check_contrast(replies, replies)


def test_every_control_that_needs_a_behaviour_is_in_the_table():
    kinds = {type(entry.control).__name__ for entry in registry.entries() if getattr(entry, "control", None)}
    assert kinds == {"Answers", "LogitDifference", "Loss"}
    assert controls.loss().shown_above is None
    gated = {entry.name for entry in registry.entries() if entry.settings.keys() & {"right_only", "recall", "judge"}}
    assert gated <= {*SCORED, "sahara", "needle_sweep"}


def test_the_prompts_that_the_model_answers_right_are_used(scores):
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    prompts = tasks.needle(tokenizer, lengths=(560,), n=6, seed=3)
    right = {prompts[number].ids for number in (1, 2, 4)}

    def known(reply, prompt):
        return prompt.ids in right

    settings: dict[str, Any] = {"n_heads": 2, "n_random_sets": 1, "max_new_tokens": 2, "kinds": (), "judge": known}
    trials = ablation_tests.ablation_test(model, prompts, scores, **settings)
    assert trials.settings["counted"] == {"accuracy": [3, 6]}
    assert all(trial.values["accuracy"] == (1.0, 1.0, 1.0) for trial in trials.trials)
    assert trials.questions == tuple(prompts[number].meta["question"] for number in (1, 2, 4))
    assert sentences_of_counted(trials.settings, n_items(trials.trials)) == [
        "The unmodified model answers 3 of 6 prompts right; these are used."
    ]
    few = ablation_tests.ablation_test(model, prompts, scores, n_prompts=2, **settings)
    assert few.questions == trials.questions[:2]
    assert "The unmodified model answers 3 of 6 prompts right; the first 2 of these are used." in few.summary()
    every = ablation_tests.ablation_test(model, prompts, scores, right_only=False, **settings)
    assert len(every.questions) == 6
    assert "counted" not in every.settings


def test_items_without_the_behaviour_leave_a_curve(scores):
    model = tiny_chat_model.model()

    def fixed(*values):
        def measure(model):
            model(torch.tensor([[1, 2]]))
            return torch.tensor(values)

        return measure

    measures = {"one": fixed(1.0, 0.0, 2.0), "other": fixed(0.0, 5.0)}
    found = causal_curve(model, {"a": scores}, measures, shown={"one": 0.5}, sizes=(1,), n_random_sets=1)
    assert {trial.values["one"] for trial in found.trials} == {(1.0, 2.0)}
    assert {trial.values["other"] for trial in found.trials} == {(0.0, 5.0)}
    assert found.settings["counted"] == {"one": [2, 3]}
    words = "Measured by one, the unmodified model shows the behaviour on 2 of 3 prompts; these are used."
    assert words in found.summary()
    assert "a" in found.conditions
    other = causal_curve(model, {"a": scores}, measures, shown={"other": 9.0}, sizes=(1,), n_random_sets=1)
    # only the first measure decides whether heads are ablated
    assert "a" in other.conditions
    assert {trial.values["other"] for trial in other.trials} == {(0.0, 5.0)}
    assert "none of 2 prompts" in other.summary()
    assert replace(found, settings={}).summary() != found.summary()
    with pytest.raises(UsageError, match=r"shown= names the measure 'third'; choose from one, other\."):
        causal_curve(model, {"a": scores}, measures, shown={"third": 0.0}, sizes=(1,), n_random_sets=1)
