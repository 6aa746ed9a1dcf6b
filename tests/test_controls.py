"""Controls of scores: what is measured with their heads out, and on which prompts."""

import pytest
import tiny_chat_model
import torch

import interp
from interp.analyses import identify, tasks
from interp.controls import control, taken
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.heads import HeadLayout
from interp.report import words

SETTINGS = {"k": 4, "draws": 2, "seed": 0, "batch_size": 4}


def literal(model, prompt, places) -> float:
    """Mean loss of the tokens at these places, one prompt at a time and without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0].float()
    losses = [-logits[place - 1].log_softmax(-1)[prompt.ids[place]] for place in places]
    return float(torch.stack(losses).mean())


def test_the_loss_of_the_second_copy_is_taken_with_the_top_heads_out():
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    prompts = tasks.repeated(tokenizer, n=12, batch=3)
    scores = identify.induction(model, prompts)
    curve = control("induction", model, prompts, scores, **SETTINGS)
    (measure,) = curve.measures
    assert measure == "loss of the second copy, nats per token"
    # a quarter of eight heads
    (size,) = curve.sizes("induction")
    assert size == 2
    point = next(p for p in curve.points if p.ranking == "induction")
    assert set(point.heads) == set(scores.top(2))
    second = [range(*prompt.spans["second"][0]) for prompt in prompts]
    with ablate(model, point.heads, "zero"):
        expected = [literal(model, prompt, places) for prompt, places in zip(prompts, second, strict=True)]
    assert point.values[measure] == pytest.approx(expected, abs=1e-4)
    base = [literal(model, prompt, places) for prompt, places in zip(prompts, second, strict=True)]
    assert curve.points[0].values[measure] == pytest.approx(base, abs=1e-4)


def test_other_texts_have_the_loss_of_all_their_tokens():
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    prompts = tasks.passages(tokenizer, n=3, length=40)
    curve = control("sinks", model, prompts, identify.sinks(model, prompts), **SETTINGS)
    assert curve.measures == ("loss, nats per token",)
    expected = [literal(model, prompt, range(1, len(prompt))) for prompt in prompts]
    assert curve.points[0].values["loss, nats per token"] == pytest.approx(expected, abs=1e-4)


def test_a_control_reads_some_of_the_prompts_and_no_more_than_a_quarter_of_the_heads():
    tokenizer = tiny_chat_model.tokenizer()
    prompts = tasks.passages(tokenizer, n=30, length=200)
    sizes, few = taken("sinks", prompts, 10, HeadLayout(2, 4, 2))
    assert sizes == [2]
    assert 4 <= len(few) < 8
    assert few.fingerprint() == prompts[: len(few)].fingerprint()
    assert taken("sinks", prompts, 10, HeadLayout(30, 9, 3))[0] == [10]
    assert len(taken("sinks", prompts[:1], 10, HeadLayout(30, 9, 3))[1]) == 1
    assert taken("gradient_importance", prompts, 10, HeadLayout(30, 9, 3)) == ([3, 10], prompts)


@pytest.mark.slow
def test_the_demo_model_needs_its_induction_heads_for_what_repeats(demo):
    model, tokenizer = demo
    prompts = tasks.repeated(tokenizer, n=40, batch=6)
    scores = interp.identify.induction(model, prompts)
    curve = control("induction", model, prompts, scores, k=10, draws=2, seed=0, batch_size=6)
    for over in ("random", "random by layer"):
        mean, low, _ = curve.gain("induction", 10, curve.measures[0], over=over)
        assert mean > 1.0
        assert low > 0
    said = words.control_words("induction", curve)
    assert "told apart on 6 prompts" in said
    assert "not told apart" not in said
