"""The limit of new tokens: one default for all replies, and results that count the replies that ended at it."""

import inspect
from dataclasses import replace

import pytest
import tiny_chat_model

import interp
from interp.analyses import identify, registry, tasks
from interp.analyses.causal import controls
from interp.analyses.measures import refusals
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.reply_limit import sentence_of_trials
from interp.analyses.results.trial import Trial
from interp.analyses.results.trials import Trials
from interp.analyses.tasks.standard import PromptSizes
from interp.hooks.generate import Reply, generate
from interp.report import words
from interp.report.trials_words import trials_words
from interp.runs.safety import SafetyPlan

METHODS = ("retrieval", "semantic_retrieval", "retrieval_reasoning", "lookback")


def replying():
    """Every function that lets a model reply, by its name."""
    found = {entry.name: entry.thing for entry in registry.entries()}
    found |= {thing.__name__: thing for thing in (interp.ablation_test, interp.pruning_curve, refusals.refusals)}
    return {name: thing for name, thing in found.items() if "max_new_tokens" in inspect.signature(thing).parameters}


@pytest.mark.parametrize(("name", "thing"), replying().items())
def test_one_default_for_all_replies(name, thing):
    assert inspect.signature(thing).parameters["max_new_tokens"].default == REPLY_TOKENS, name


def test_a_run_and_its_controls_share_the_limit():
    assert PromptSizes().reply_tokens == SafetyPlan().reply_tokens == controls.answers().new_tokens == REPLY_TOKENS
    sizes = PromptSizes(reply_tokens=7)
    assert controls.answers().with_sizes(sizes).new_tokens == 7
    assert controls.loss().with_sizes(sizes).new_tokens == 0


@pytest.fixture(scope="module")
def needles():
    return tasks.needle(tiny_chat_model.tokenizer(), lengths=(900,), n=3)


@pytest.fixture(scope="module")
def model():
    return tiny_chat_model.model()


@pytest.mark.parametrize("name", METHODS)
def test_head_scores_count_replies_at_the_limit(model, needles, name):
    scores = getattr(identify, name)(model, needles, max_new_tokens=2)
    assert scores.extras["at_limit"].shape == scores.per_prompt.shape
    assert scores.extras["at_limit"].all()
    sentence = "3 of 3 replies ended at the limit of 2 new tokens."
    assert sentence in scores.summary()
    assert sentence in words.facts(scores, None)
    joined = HeadScores.concat([scores, scores])
    assert "6 of 6 replies" in joined.summary()


def test_scores_without_replies_say_nothing_about_a_limit(model, needles):
    forced = identify.retrieval(model, needles, form="forced")
    assert "limit" not in forced.summary()
    assert "at_limit" not in forced.extras
    given = identify.lookback(model, needles, replies=[Reply((5, 6), "")] * 3)
    assert "at_limit" not in given.extras


def test_an_ablation_test_counts_them_under_each_condition(model, needles):
    verdicts = iter([True, False, False] * 4)
    trials = interp.ablation_test(
        model, needles, interp.HeadSet.parse("L0H1"), n_random_sets=1, max_new_tokens=2, kinds=(),
        right_only=False, judge=lambda reply, prompt: next(verdicts),
    )  # fmt: skip
    for trial in trials.trials:
        assert trial.facts["at_limit"] == 1
        assert trial.facts["wrong_at_limit"] == pytest.approx(2 / 3)
    sentence = (
        "12 of 12 replies were cut at 2 new tokens. 8 of these were not right by then and are counted as wrong, "
        "although a right answer might have followed. By condition: baseline 2 of 3, top 2 of 3, random 2 of 3, random "
        "by layer 2 of 3."
    )
    assert trials.summary().splitlines()[-2:] == sentence.replace(". By", ".\n  By").splitlines()
    assert trials_words(trials)[-1] == sentence
    joined = Trials.concat([trials, trials]).summary()
    assert "16 of these were not right by then" in joined
    assert "By condition: baseline 4 of 6, top 4 of 6," in joined


def test_a_reply_that_ends_by_itself_is_not_counted(needles):
    ending = tiny_chat_model.model()
    (reply,) = generate(ending, needles[:1], max_new_tokens=1)
    ending.generation_config.eos_token_id = reply.ids[0]
    trials = interp.ablation_test(
        ending, needles[:1], interp.HeadSet.parse("L0H1"), n_random_sets=1, max_new_tokens=3, judge=lambda *_: True
    )
    assert trials.trials[0].facts == {"at_limit": 0, "wrong_at_limit": 0}
    assert "None of 5 replies was cut at 3 new tokens." in trials.summary()
    cut = tuple(replace(trial, facts={"at_limit": 1, "wrong_at_limit": 0}) for trial in trials.trials[:2])
    said = "2 of 2 replies were cut at 3 new tokens, and none of these is counted as wrong."
    assert said in replace(trials, trials=cut).summary()


@pytest.mark.parametrize(
    ("cut", "wrong", "said"),
    [
        (1, 1, "1 of 4 replies was cut at 9 new tokens and is counted as wrong: it was not right by then, although"),
        (3, 1, "3 of 4 replies were cut at 9 new tokens. 1 of these was not right by then and is counted as wrong,"),
        (3, 2, "3 of 4 replies were cut at 9 new tokens. 2 of these were not right by then and are counted as wrong,"),
        (3, 3, "3 of 4 replies were cut at 9 new tokens and are counted as wrong: none was right by then, although"),
        (1, 0, "1 of 4 replies was cut at 9 new tokens, and none of these is counted as wrong."),
    ],
)
def test_the_sentence_agrees_with_its_numbers(cut, wrong, said):
    facts = {"at_limit": cut / 4, "wrong_at_limit": wrong / 4}
    trial = Trial("top", {"accuracy": (0.0,) * 4}, replies=("x",) * 4, facts=facts)
    assert sentence_of_trials([trial], {"max_new_tokens": 9}).startswith(said)
