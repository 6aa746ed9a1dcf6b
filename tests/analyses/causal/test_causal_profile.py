"""Dose and kind: heads ablated in several ways, kept alone, compared by depth, and two tables by their differences."""

from dataclasses import replace
from typing import Any

import pytest
import tiny_chat_model
import torch
from detectors import prompts

import interp
from interp.analyses import identify, tasks
from interp.analyses.causal import ablated_measures
from interp.analyses.causal.ablated_measures import KINDS, Ablations, accuracy, neutral_loss
from interp.analyses.causal.causal_profile import causal_profile
from interp.analyses.causal.random_sets import KeptSets, role_of
from interp.analyses.causal.set_difference import set_difference
from interp.analyses.measures.losses import SpanLoss, token_losses
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.set_test import SetTest
from interp.analyses.results.trials import Trials
from interp.errors import ScoreError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.heads import Head, HeadSet
from interp.testing import planted

PLANTED = planted.make("induction", 3, "llama")
COPIES, OTHERS = prompts("induction", 5), prompts("induction", 9)
JOB = HeadSet((Head(*PLANTED.head), Head(*PLANTED.helper or (0, 0))))


def verdict(trials: Trials, *condition: Any, **size: Any) -> SetTest:
    found = trials.set_test(*condition, **size)
    assert found is not None
    return found


def copying(model):
    return token_losses(model, COPIES, loss=SpanLoss("second"))


def table(first: HeadSet, name: str = "made", threshold: float | None = None) -> HeadScores:
    """Scores in which some heads are first, in order, and all others follow."""
    values = torch.rand(3, planted.LAYERS, planted.HEADS, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.05
    for place, head in enumerate(first):
        values[:, head.layer, head.head] = 0.9 - 0.1 * place
    return HeadScores(name, values, threshold=threshold)


def profile(scores: HeadScores, **settings: Any) -> Trials:
    given: dict[str, Any] = {"sizes": (1, 2), "n_random_sets": 39, "reference": OTHERS}
    return causal_profile(PLANTED.model, scores, {"loss": copying}, **given | settings)


@pytest.fixture(scope="module")
def found() -> Trials:
    return profile(table(JOB))


def test_every_condition_is_the_ablation_that_its_name_says(found):
    for trial in found.trials:
        kind = (trial.matched or trial.condition).rpartition("(")[2].removesuffix(")")
        if trial.draw > 1 or trial.condition == "baseline":
            continue
        reference = None if kind == "zero" else OTHERS
        with ablate(PLANTED.model, trial.heads, kind, reference=reference, seed=0):
            assert trial.values["loss"] == pytest.approx(copying(PLANTED.model).tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_planted_heads_are_needed_and_suffice_under_every_ablation(found, kind):
    base = found.mean("baseline").mean
    needed = verdict(found, f"made ({kind})", size=2)
    # in layers of few heads, some random sets have the planted heads too
    shared = [trial for trial in found.select("random by layer", 2, matched=f"made ({kind})") if trial.heads & JOB]
    assert needed.n_sets - needed.n_beyond <= len(shared) < needed.n_sets
    assert found.mean(f"made ({kind})", size=2).mean > base + 1
    # every other head is ablated, and the job is still done
    kept = verdict(found, f"made kept ({kind})", size=2)
    assert kept.is_beyond
    assert found.mean(f"made kept ({kind})", size=2).mean < base + 0.5
    assert found.mean("random kept", size=2, matched=f"made kept ({kind})").mean > base + 1


def test_other_heads_are_neither_needed_nor_do_they_suffice():
    noise = HeadSet(tuple(head for head in table(JOB).layout.all() if head not in JOB))
    other = HeadSet(noise.heads[:2])
    null = profile(table(other), sizes=(2,))
    for condition in ("made (zero)", "made (mean)", "made (resample)"):
        test = verdict(null, condition)
        assert test.decided
        assert not test.is_beyond
    for kind in KINDS:
        assert not verdict(null, f"made kept ({kind})").is_beyond


def test_the_role_is_what_the_threshold_or_the_floor_says():
    scores = table(JOB)
    assert role_of(scores, JOB) == scores.layout.all()
    above = replace(scores, threshold=0.5)
    assert role_of(above, HeadSet(JOB.heads[:1])) == JOB
    assert role_of(above, JOB | HeadSet.parse("L0H0")) == JOB | HeadSet.parse("L0H0")
    # heads at the floor of a table have no role
    zeros = replace(scores, per_prompt=scores.per_prompt.where(scores.per_prompt > 0.5, 0.0))
    assert role_of(zeros, HeadSet(JOB.heads[:1])) == JOB


def test_without_another_head_of_the_role_nothing_is_kept():
    found = profile(table(JOB, threshold=0.5), sizes=(1, 2), kinds=("zero",), n_random_sets=2)
    assert found.sizes("made kept (zero)") == (1,)
    assert found.notes == (
        "No other head is above the threshold of made, so there is no condition in which the tested heads are kept.",
    )
    assert not profile(table(JOB), sizes=(1,), n_random_sets=1, sufficiency=False).claims


def test_kept_sets_are_drawn_from_the_role():
    role = HeadSet.parse("L0H0-L0H3, L1H0, L2H1")
    heads = HeadSet.parse("L1H0, L2H1")
    sets = list(KeptSets(heads, role, 20, name="kept").conditions())
    assert all(len(condition.heads) == 4 and not condition.heads - role and condition.size == 2 for condition in sets)
    # the tested heads are one choice of the role
    assert len({condition.heads for condition in sets}) > 8
    assert [each.heads for each in KeptSets(heads, role, 20, name="kept").conditions()] == [s.heads for s in sets]


def test_the_depth_profile_is_a_baseline_of_curves_and_profiles(found):
    scores = table(JOB)
    first = HeadSet(tuple(scores.depth_profile().top(2)))
    assert found.select("made by depth (mean)", 2)[0].heads == first
    curve = interp.causal_curve(
        PLANTED.model, {"made": scores, "listed": list(JOB)}, {"loss": copying}, sizes=(1, 2), n_random_sets=1
    )
    assert curve.conditions == ("baseline", "made", "listed", "made by depth", "random", "random by layer")
    assert curve.select("made by depth", 2)[0].heads == first
    # a baseline ranking has no random sets of its own
    assert curve.set_test("made by depth", size=2) is None


def test_a_curve_shows_other_ablations_and_neutral_text_without_random_sets():
    neutral = prompts("duplicate_token", 2)
    curve = interp.causal_curve(
        PLANTED.model, {"made": table(JOB)}, {"loss": copying}, sizes=(1, 2), n_random_sets=2,
        kinds=("zero", "mean", "resample"), reference=OTHERS, neutral=neutral, sufficiency=True, depth=False,
    )  # fmt: skip
    assert curve.tested == (
        "made", "made (mean)", "made (resample)", "made kept", "made kept (mean)", "made kept (resample)"
    )  # fmt: skip
    (trial,) = curve.select("made (mean)", 2)
    with ablate(PLANTED.model, JOB, "mean", reference=OTHERS):
        assert trial.values["loss"] == pytest.approx(copying(PLANTED.model).tolist(), abs=1e-4)
        assert trial.values[ablated_measures.NEUTRAL] == pytest.approx(
            token_losses(PLANTED.model, neutral).tolist(), abs=1e-4
        )
    assert all(set(trial.values) == {"loss"} for trial in curve.trials if trial.condition.startswith("random"))
    assert curve.set_test("made", ablated_measures.NEUTRAL, size=2) is None
    assert curve.set_test("made (mean)", size=2) is None
    assert len(curve.rows()) == len({(row["condition"], row["size"], row["measure"]) for row in curve.rows()})


def test_outputs_of_the_reference_are_read_once_where_they_fit(monkeypatch):
    read = []

    def counted(model, heads, intervention, work=ablated_measures.ReferenceOutputs.of, **settings):
        if intervention.reference is not None:
            read.append(len(heads))
        return work(model, heads, intervention, **settings)

    monkeypatch.setattr(ablated_measures.ReferenceOutputs, "of", counted)
    whole = profile(table(JOB), n_random_sets=2)
    assert read == [planted.LAYERS * planted.HEADS] * 2
    monkeypatch.setattr(ablated_measures, "MAX_SHARED_BYTES", 0)
    one_by_one = profile(table(JOB), n_random_sets=2)
    assert len(read) > 4
    for one, other in zip(whole.trials, one_by_one.trials, strict=True):
        assert one.values["loss"] == pytest.approx(other.values["loss"], abs=1e-5)
    assert Ablations(PLANTED.model, None, 0).outputs("mean") is None


def test_a_profile_is_kept_in_a_folder_and_as_a_file(tmp_path):
    scores = table(JOB)
    first = profile(scores, n_random_sets=2, folder=tmp_path / "steps", about="copies")
    again = profile(scores, n_random_sets=2, folder=tmp_path / "steps", about="copies")
    assert first.trials == again.trials
    loaded = Trials.load(first.save(tmp_path / "profile"))
    assert loaded.claims == first.claims
    assert loaded.rows() == first.rows()
    assert "made kept (zero)" in first.summary()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ()}, "0 kinds and n_random_sets=39 make no profile"),
        ({"n_random_sets": 0}, "n_random_sets=0 make no profile"),
        ({"sizes": (7,)}, "do not fit a model of 12 heads; give 1 to 6"),
        ({"sizes": ()}, "do not fit a model"),
        ({"reference": None}, "ablation 'mean' needs reference prompts; give reference="),
        ({"folder": "somewhere"}, "a folder needs about="),
    ],
)
def test_profiles_that_cannot_be_made(settings, message):
    with pytest.raises(UsageError, match=message):
        profile(table(JOB), **settings)


def test_a_table_without_ranked_heads_has_no_profile():
    zeros = replace(table(JOB), per_prompt=torch.zeros(3, planted.LAYERS, planted.HEADS))
    with pytest.raises(UsageError, match="the table 'made' ranks 0 heads, too few for sizes"):
        profile(zeros)
    with pytest.raises(UsageError, match="0 measures"):
        causal_profile(PLANTED.model, table(JOB), {}, kinds=("zero",))


def test_heads_of_one_table_alone_are_told_from_those_of_another():
    noise = [head for head in table(JOB).layout.all() if head not in JOB and head.layer == PLANTED.head[0]]
    shared, other = HeadSet((noise[0],)), HeadSet((noise[1],))
    job = HeadSet((Head(*PLANTED.head),))
    a, b = table(job, "copying"), table(other, "other")
    values = [each.per_prompt.clone() for each in (a, b)]
    for each in values:
        each[:, noise[0].layer, noise[0].head] = 0.8
    a, b = (replace(each, per_prompt=made) for each, made in zip((a, b), values, strict=True))
    neutral = prompts("duplicate_token", 2)
    trials = set_difference(PLANTED.model, a, b, repeated=COPIES, neutral=neutral, n_heads=2, n_random_sets=39)
    assert trials.tested == ("only copying", "only other", "both")
    assert [trials.select(name)[0].heads for name in trials.tested] == [job, other, shared]
    assert trials.measures == ("loss on the second copy of repeated tokens", "loss on neutral text")
    # one of the few heads of a layer is drawn again too often to be beyond 39 sets
    assert verdict(trials, "only copying").difference > 1
    assert not verdict(trials, "only other").is_beyond
    assert not verdict(trials, "both").is_beyond
    # a verdict on every measure, although the draws may end early
    assert all(verdict(trials, name, measure).decided for name in trials.tested for measure in trials.measures)
    random = [trial for trial in trials.trials if trial.condition == "random by layer"]
    for trial in random:
        assert not trial.heads & ((job | other | shared) - trials.select(trial.matched)[0].heads)
    assert {trial.matched for trial in random} == set(trials.tested)


def test_two_tables_on_needles_copies_and_plain_text():
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    copies = tasks.repeated(tokenizer, n=12, batch=3)
    needles = tasks.needle(tokenizer, lengths=(560,), n=3, seed=3)
    neutral = tasks.passages(tokenizer, n=2, length=40)
    a = identify.induction(model, copies)
    b = replace(a, name="flipped", per_prompt=a.per_prompt.flip(2))
    trials = set_difference(
        model, a, b, needles=needles, repeated=copies, neutral=neutral, n_heads=2, n_random_sets=1, max_new_tokens=2
    )
    assert trials.measures[0] == "accuracy"
    assert (trials.shares, len(trials.measures)) == (("accuracy",), 3)
    assert [len(values) for values in trials.trials[0].values.values()] == [3, 3, 2]
    assert accuracy(needles, max_new_tokens=2)(model).tolist() == list(trials.trials[0].values["accuracy"])
    assert neutral_loss(neutral)(model).tolist() == pytest.approx(list(trials.trials[0].values["loss on neutral text"]))


def test_tables_that_cannot_be_compared():
    a = table(JOB, "a")
    given: dict[str, Any] = {"neutral": COPIES, "n_random_sets": 1, "n_heads": 2}
    with pytest.raises(UsageError, match="the top 2 of 'a' and of 'b' are the same 2 heads"):
        set_difference(PLANTED.model, a, replace(a, name="b"), **given)
    with pytest.raises(UsageError, match="both tables are named 'a'"):
        set_difference(PLANTED.model, a, a, **given)
    other = table(HeadSet.parse("L0H0, L0H1"), "b")
    with pytest.raises(UsageError, match="no prompts to measure on; give needles="):
        set_difference(PLANTED.model, a, other, n_heads=2)
    with pytest.raises(ScoreError, match="compare tables of one shape"):
        set_difference(PLANTED.model, a, HeadScores("c", torch.rand(2, 2, 4)), **given)
