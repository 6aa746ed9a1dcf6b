"""Controls of scores: the measure with the top heads ablated, on which prompts, and how many heads."""

from dataclasses import replace

import pytest
import tiny_chat_model
import torch

import interp
from interp.analyses import identify, registry, tasks
from interp.analyses.prompt_sizes import PromptSizes
from interp.analyses.tasks.standard import CHECK_SEED
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.heads import HeadLayout
from interp.runs.plan import ScorePlan
from interp.runs.run import Run

SETTINGS = {"n_heads": 4, "n_random_sets": 2, "seed": 0, "batch_size": 4}


def literal(model, prompt, places) -> float:
    """Mean loss of the tokens at these places, one prompt at a time and without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0].float()
    losses = [-logits[place - 1].log_softmax(-1)[prompt.ids[place]] for place in places]
    return float(torch.stack(losses).mean())


def control(name):
    return registry.get(name).control


def test_the_loss_of_the_second_copy_is_measured_with_the_top_heads_ablated():
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    prompts = tasks.repeated(tokenizer, n=12, batch=3)
    scores = identify.induction(model, prompts)
    trials = control("induction")(model, prompts, scores, **SETTINGS)
    (measure,) = trials.measures
    assert "second" in measure
    # a quarter of eight heads
    (size,) = trials.sizes("top")
    assert size == 2
    (trial,) = trials.select("top")
    assert set(trial.heads) == set(scores.top(2))
    second = [range(*prompt.spans["second"][0]) for prompt in prompts]
    with ablate(model, trial.heads, "zero"):
        expected = [literal(model, prompt, places) for prompt, places in zip(prompts, second, strict=True)]
    assert trial.values[measure] == pytest.approx(expected, abs=1e-4)
    base = [literal(model, prompt, places) for prompt, places in zip(prompts, second, strict=True)]
    assert trials.select("baseline")[0].values[measure] == pytest.approx(base, abs=1e-4)


def test_other_texts_have_the_loss_of_all_their_tokens():
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    prompts = tasks.passages(tokenizer, n=3, length=40)
    trials = control("sinks")(model, prompts, identify.sinks(model, prompts), **SETTINGS)
    (measure,) = trials.measures
    assert "second" not in measure
    expected = [literal(model, prompt, range(1, len(prompt))) for prompt in prompts]
    assert trials.select("baseline")[0].values[measure] == pytest.approx(expected, abs=1e-4)


def test_a_control_reads_some_of_the_prompts_and_ablates_no_more_than_a_quarter_of_the_heads():
    tokenizer = tiny_chat_model.tokenizer()
    prompts = tasks.passages(tokenizer, n=30, length=200)
    few = control("sinks").used(prompts)
    assert control("sinks").head_counts(10, HeadLayout(2, 4, 2)) == [2]
    assert 4 <= len(few) < 8
    assert [prompt.ids for prompt in few] == [prompt.ids[:96] for prompt in prompts[: len(few)]]
    assert control("sinks").head_counts(10, HeadLayout(30, 9, 3)) == [10]
    assert len(control("sinks").used(prompts[:1])) == 1
    importance = control("gradient_importance")
    assert importance.head_counts(10, HeadLayout(30, 9, 3)) == [3, 10]
    assert importance.used(prompts).fingerprint() == prompts.fingerprint()
    assert importance.chooses
    assert not control("retrieval").chooses
    assert not control("retrieval").own_prompts


@pytest.mark.slow
def test_the_demo_model_needs_its_induction_heads_for_what_repeats(demo):
    model, tokenizer = demo
    prompts = tasks.repeated(tokenizer, n=40, batch=6)
    scores = interp.identify.induction(model, prompts)
    trials = control("induction")(model, prompts, scores, n_heads=10, n_random_sets=2, seed=0, batch_size=6)
    for over in ("random", "random by layer"):
        mean, low, _ = trials.gain("top", over=over)
        assert mean > 1.0
        assert low > 0


@pytest.mark.parametrize("name", ["induction", "previous_token", "duplicate_token", "sinks"])
def test_a_control_of_a_run_knows_the_threshold_that_its_analysis_declares(tmp_path, name):
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    plan = ScorePlan(
        analyses=(name,), n_heads=1, n_random_sets=1, sizes=PromptSizes(n_texts=2, text_length=24, n_repeated=12)
    )
    run = Run.open(tmp_path, plan, model, tokenizer).finish(progress=False)
    scores, trials = run.scores[name], run[f"{name}.control"]
    (top,) = trials.select("top")
    others = set(scores.heads(above=0.3)) - set(top.heads)
    kept = trials.select("top kept")[0].heads if "top kept" in trials.conditions else ()
    # without the threshold, all heads with a score above the lowest have the role
    assert set(kept) == others


@pytest.mark.parametrize("name", ["induction", "previous_token"])
def test_heads_are_tested_on_other_prompts_than_scored_them(tmp_path, name):
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    sizes = PromptSizes(n_texts=3, text_length=24, n_repeated=12, seed=5)
    plan = ScorePlan(analyses=(name,), n_heads=1, n_random_sets=1, sizes=sizes)
    trials = Run.open(tmp_path, plan, model, tokenizer).finish(progress=False)[f"{name}.control"]
    entry, (measure, *_) = registry.get(name), trials.measures
    values = {}
    for kind, seed in (("scored", sizes.seed), ("tested", sizes.seed + CHECK_SEED)):
        prompts = entry.control.used(entry.prompts(replace(sizes, seed=seed), tokenizer))
        values[kind] = tuple(entry.control.measure_on(prompts, plan.batch_size)[1](model).tolist())
    assert trials.select("baseline")[0].values[measure] == pytest.approx(values["tested"], abs=1e-4)
    assert values["tested"] != pytest.approx(values["scored"], abs=1e-2)
