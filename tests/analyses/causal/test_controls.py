"""Controls of scores: their measures, prompts and numbers of heads, and a killed control that continues."""

from dataclasses import replace
from typing import Any

import pytest
import tiny_chat_model
import torch

from interp.analyses import identify, registry, tasks
from interp.analyses.causal import ablated_measures, ablation_test, controls
from interp.analyses.measures.answer_logits import logit_differences
from interp.analyses.results.trial import Trial
from interp.analyses.results.trials import Trials
from interp.analyses.tasks.standard import PromptSizes
from interp.errors import PromptError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts

SETTINGS: dict[str, Any] = {"n_heads": 4, "n_random_sets": 2, "seed": 0, "batch_size": 4}
SMALL = PromptSizes(n_check_needles=3, check_length=560)
LOOKING = controls.loss(span="second", n_tokens=300)
KINDS = {"answers": controls.answers(), "logits": controls.logit_difference(), "loss": controls.loss(), "span": LOOKING}


@pytest.fixture(scope="module")
def chat():
    return tiny_chat_model.model(), tiny_chat_model.tokenizer()


def prompts_of(kind, tokenizer):
    """The prompts of each kind of control, as a run gives them."""
    if kind == "answers":
        # an answer of filler words is in every reply, so that a model that learned nothing is right
        made = KINDS[kind].prompts(SMALL, tokenizer)
        return replace(made, items=tuple(replace(each, meta={**each.meta, "answer": "the"}) for each in made))
    if kind == "logits":
        # the model prefers 4 to 5, so that it is right on one half of the prompts
        ends = [{"right": [one], "wrong": [other]} for one, other in ("45", "54", "45", "54")]
        rows = [{"text": f"{i} is to {i + 1} as 3 is to", "meta": meta} for i, meta in enumerate(ends)]
        return Prompts.encode(tokenizer, rows)
    return tasks.repeated(tokenizer, n=12, batch=3)


def literal(model, prompt, places):
    """Mean loss of the tokens at these places, one prompt at a time and without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0].float()
    losses = [-logits[place - 1].log_softmax(-1)[prompt.ids[place]] for place in places]
    return float(torch.stack(losses).mean())


def test_the_loss_of_the_second_copy_with_the_top_heads_ablated(chat):
    model, tokenizer = chat
    prompts = tasks.repeated(tokenizer, n=12, batch=3)
    scores = identify.induction(model, prompts)
    trials = LOOKING(model, prompts, scores, **SETTINGS)
    (measure,) = trials.measures
    assert (measure, trials.units) == ("loss on the second copy of repeated tokens", {measure: "nats per token"})
    # a quarter of eight heads
    assert trials.sizes("top") == trials.sizes("random") == trials.sizes("random by layer") == (2,)
    (top,) = trials.select("top")
    assert set(top.heads) == set(scores.top(2))
    second = [range(*prompt.spans["second"][0]) for prompt in prompts]
    for trial in trials.trials:
        with ablate(model, trial.heads, "zero"):
            expected = [literal(model, prompt, places) for prompt, places in zip(prompts, second, strict=True)]
        assert trial.values[measure] == pytest.approx(expected, abs=1e-4)
    # scores of attention were not chosen by the loss
    assert not LOOKING.chooses
    assert not trials.notes
    assert trials.claim


def test_prompts_without_the_span_have_the_loss_of_all_their_tokens(chat):
    model, tokenizer = chat
    prompts = tasks.passages(tokenizer, n=3, length=40)
    trials = LOOKING(model, prompts, identify.sinks(model, prompts), **SETTINGS)
    assert trials.measures == ("loss",)
    expected = [literal(model, prompt, range(1, len(prompt))) for prompt in prompts]
    assert trials.select("baseline")[0].values["loss"] == pytest.approx(expected, abs=1e-4)


def test_the_logit_difference_of_answers(chat):
    model, tokenizer = chat
    prompts = prompts_of("logits", tokenizer)
    scores = identify.induction(model, tasks.repeated(tokenizer, n=12, batch=3))
    trials = KINDS["logits"](model, prompts, scores, **SETTINGS)
    assert (trials.measures, trials.units) == (("logit difference",), {})
    assert trials.sizes("top") == (1, 4)
    assert trials.notes == (controls.OWN_PROMPTS,)
    shows = logit_differences(model, prompts) > 0
    assert 0 < shows.sum() < len(shows)
    assert trials.settings["counted"] == {"logit difference": [int(shows.sum()), len(shows)]}
    for trial in trials.trials:
        with ablate(model, trial.heads, "zero"):
            expected = logit_differences(model, prompts)[shows].tolist()
            assert trial.values["logit difference"] == pytest.approx(expected, abs=1e-6)
    assert not any(set(t.heads) & set(scores.top(int(t.size))) for t in trials.trials if t.condition == "random")


def test_answers_are_of_needles_that_no_score_saw(chat):
    model, tokenizer = chat
    control = KINDS["answers"]
    prompts = control.prompts(SMALL, tokenizer)
    # twice as many as are used
    assert len(prompts) == 6
    assert control.with_sizes(SMALL).n_prompts == 3
    prompts = prompts_of("answers", tokenizer)
    assert not control.own_prompts
    assert not control.chooses
    scores = identify.induction(model, tasks.repeated(tokenizer, n=12, batch=3))
    trials = control(model, prompts, scores, **SETTINGS)
    assert (trials.name, trials.title, trials.measures) == ("induction", "Accuracy with heads ablated", ("accuracy",))
    assert trials.conditions == ("baseline", "top", "top kept", "top by depth", "random", "random by layer")
    assert trials.sizes("top") == (4,)
    plain = ablation_test.ablation_test(model, prompts, scores, kinds=(), **SETTINGS)
    assert trials.trials == plain.trials


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_the_users_choice(chat, kind):
    model, tokenizer = chat
    prompts, heads = prompts_of(kind, tokenizer), HeadSet.parse("L0H3, L1H2")
    scores = identify.induction(model, tasks.repeated(tokenizer, n=12, batch=3))
    settings = SETTINGS | {"heads": heads, "n_random_sets": 1, "ablation": "uniform"}
    trials = KINDS[kind](model, prompts, scores, **settings)
    (tested,) = trials.tested
    assert trials.sizes(tested) == (2,)
    assert trials.select(tested)[0].heads == heads
    assert trials.intervention == "uniform"


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_control_continues_with_the_same_numbers(chat, tmp_path, monkeypatch, kind):
    model, tokenizer = chat
    prompts = prompts_of(kind, tokenizer)
    scores = identify.induction(model, tasks.repeated(tokenizer, n=12, batch=3))
    whole = KINDS[kind](model, prompts, scores, **SETTINGS)
    measured, sittings = [], 0

    def counted(model, heads, *rest, work=ablated_measures.ablate, **settings):
        if len(measured) == 2 * sittings:
            raise KeyboardInterrupt
        measured.append(heads)
        return work(model, heads, *rest, **settings)

    monkeypatch.setattr(ablated_measures, "ablate", counted)
    found = None
    while found is None:
        sittings += 1
        assert sittings < 12
        try:
            found = KINDS[kind](model, prompts, scores, folder=tmp_path, **SETTINGS)
        except KeyboardInterrupt:
            # every sitting keeps the two conditions that it finished
            kept = [path for path in tmp_path.iterdir() if not path.name.startswith("behaviour")]
            assert len(kept) == len(measured) == 2 * sittings
    assert sittings > 1
    assert len(measured) == len(set(measured)) == len({trial.heads for trial in whole.trials})
    assert found.trials == whole.trials
    assert found.rows() == whole.rows()
    again = Trials.load(found.save(tmp_path / "control"))
    assert again.rows() == whole.rows()
    assert (again.title, again.units, again.notes) == (whole.title, whole.units, whole.notes)


def test_conditions_of_other_prompts_or_another_ablation_are_measured_again(chat, tmp_path):
    model, tokenizer = chat
    scores = identify.induction(model, tasks.repeated(tokenizer, n=12, batch=3))
    for number in (0, 1):
        prompts = tasks.repeated(tokenizer, n=12, batch=3, seed=number)
        for ablation in ("zero", "uniform"):
            settings: dict[str, Any] = SETTINGS | {"ablation": ablation}
            kept = LOOKING(model, prompts, scores, folder=tmp_path, **settings)
            assert kept.trials == LOOKING(model, prompts, scores, **settings).trials


def test_a_control_of_attention_takes_few_prompts_and_heads():
    tokenizer = tiny_chat_model.tokenizer()
    prompts = tasks.passages(tokenizer, n=30, length=200)
    few = LOOKING.used(prompts)
    # all tokens of a prompt count, so it reads only the first of each
    assert few.lengths == (96,) * 4
    assert [prompt.ids for prompt in few] == [prompt.ids[:96] for prompt in prompts[:4]]
    spans = tasks.repeated(tokenizer, n=120, batch=3)
    assert LOOKING.used(spans).fingerprint() == spans[:2].fingerprint()
    assert LOOKING.head_counts(10, HeadLayout(2, 4, 2)) == [2]
    assert LOOKING.head_counts(10, HeadLayout(30, 9, 3)) == [10]
    # an interval needs two prompts, however long they are
    assert len(controls.loss(n_tokens=1).used(prompts)) == 2
    assert len(LOOKING.used(prompts[:1])) == 1
    whole = controls.loss()
    assert whole.head_counts(10, HeadLayout(30, 9, 3)) == [3, 10]
    assert whole.head_counts(2, HeadLayout(30, 9, 3)) == [1, 2]
    assert whole.used(prompts) is prompts
    assert whole.chooses


def test_declared_controls_are_of_these_kinds():
    kinds = {name: registry.get(name).control for name in registry.names()}
    assert kinds["induction"] == kinds["sinks"] == LOOKING
    assert kinds["gradient_importance"] == controls.loss()
    assert kinds["activation_patching"] == kinds["logit_attribution"] == controls.logit_difference()
    assert kinds["retrieval"] == controls.answers()


@pytest.mark.parametrize(("held_out", "named"), [(False, False), (True, False), (False, True)])
def test_heads_that_the_measure_chose_on_these_prompts_have_no_test(chat, held_out, named):
    model, tokenizer = chat
    prompts = prompts_of("logits", tokenizer)
    scores = identify.induction(model, tasks.repeated(tokenizer, n=12, batch=3))
    heads = HeadSet.parse("L0H3") if named else None
    trials = KINDS["logits"](model, prompts, scores, held_out=held_out, heads=heads, **SETTINGS)
    tested = trials.set_test(trials.tested[0], size=max(trials.sizes(trials.tested[0])))
    assert (tested is None) == bool(trials.notes) == (not held_out and not named)


def test_costs_grow_with_the_conditions(chat):
    model, tokenizer = chat
    for kind, control in KINDS.items():
        prompts = prompts_of(kind, tokenizer)
        one, three = (control.cost(model, prompts, 4, n_heads=4, n_random_sets=n) for n in (1, 3))
        sizes = 2 if kind in ("logits", "loss") else 1
        # up to three sets are drawn freely as well
        # the tested heads are ablated and kept, and there are the first heads by depth
        # replies are read once more, to find those that are right
        first = 2 if kind == "answers" else 1
        conditions = {n: first + sizes * (3 + 2 * n) for n in (1, 3)}
        kinds = control.cost(model, prompts, 4, n_heads=4, n_random_sets=1, n_kinds=2)
        assert kinds.tokens / one.tokens == pytest.approx((conditions[1] + sizes * 4) / conditions[1])
        assert controls.n_sets(99) == 102
        assert three.tokens / one.tokens == pytest.approx(conditions[3] / conditions[1])
        assert one.teraflops > 0


def test_bad_input(chat):
    model, tokenizer = chat
    prompts = tasks.passages(tokenizer, n=3, length=40)
    scores = identify.sinks(model, prompts)
    with pytest.raises(UsageError, match="n_tokens=0 leaves no prompt; give at least 1, or None"):
        controls.loss(n_tokens=0)
    with pytest.raises(PromptError, match='no "right"'):
        KINDS["logits"](model, Prompts.from_ids([[5, 6, 7]]), scores, **SETTINGS)
    with pytest.raises(UsageError, match="n_random_sets=0"):
        KINDS["loss"](model, prompts, scores, **SETTINGS | {"n_random_sets": 0})


@pytest.mark.slow
def test_the_demo_model_needs_its_induction_heads_for_repeated_text(demo):
    model, tokenizer = demo
    prompts = tasks.repeated(tokenizer, n=40, batch=6)
    scores = identify.induction(model, prompts)
    trials = LOOKING(model, prompts, scores, n_heads=10, n_random_sets=2, seed=0, batch_size=6)
    for over in ("random", "random by layer"):
        mean, low, _ = trials.gain("top", size=10, over=over)
        assert mean > 1.0
        assert low > 0


@pytest.mark.parametrize(("control", "unit"), [("answers", ""), ("logits", ""), ("loss", "nats per token")])
def test_a_control_and_its_profile_state_the_unit_of_its_measure(control, unit):
    """A share of right answers is no number of nats."""
    used = KINDS[control]
    trials = Trials("made", (Trial("baseline", {"made": (1.0, 0.5)}),), "zero", claim="larger effect", notes=("kept",))
    told = used.describe(trials, "made", [], held_out=True)
    assert told.units == ({"made": unit} if unit else {})
    assert (told.claim, told.notes) == ("larger effect", ("kept",))
    own = used.describe(trials, "made", [3, 4], held_out=False)
    assert (own.claim is None) == used.chooses
    assert own.settings["counted"] == {"made": [3, 4]}
