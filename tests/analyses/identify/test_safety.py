"""Ships, Sahara and causal curves: a planted refusal head, the formulas of the papers, and refused input."""

import itertools
import math

import pytest
import run_cases
import torch

import interp
from interp.analyses.causal.curve import causal_curve
from interp.analyses.causal.random_sets import N_FREE_SETS
from interp.analyses.identify._subspace import angle
from interp.analyses.identify.sahara import SaharaResult, sahara
from interp.analyses.identify.ships import ships
from interp.errors import ModelError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.testing import planted
from interp.testing.families import make

SEEDS = range(20)
FEW = range(4)


def refusals(rows):
    """1 for each prompt after which the model says NO."""

    def measure(model):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(rows)).logits[:, -1]
        return (logits.argmax(-1) == planted.NO).float()

    return measure


def encoded(rows):
    return Prompts.from_ids(rows, pad_id=planted.PAD)


@pytest.mark.parametrize("seeds", [FEW, pytest.param(SEEDS, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("ablation", ["uniform", "zero"])
def test_the_planted_refusal_head_is_first_in_every_seed(family, ablation, seeds):
    for seed in seeds:
        model, place = (made := planted.refusing(seed, family)).model, Head(*made.head)
        prompts = encoded(planted.requests(seed))
        found = ships(model, prompts, judge=None, ablation=ablation)
        assert found.top(1) == [place]
        assert found[place] > 20 * found[found.top(2)[1]]
        group = sahara(model, prompts, judge=None, ablation=ablation, size=1, n_random_sets=2)
        assert group.ranking == (place,)
        assert group.groups.mean("sahara").mean > 10 * group.groups.mean("random").high
        assert group.scores.top(1) == [place]


@pytest.mark.parametrize("seeds", [FEW, pytest.param(SEEDS, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("ablation", ["uniform", "zero"])
def test_ablating_it_flips_the_behaviour_and_no_other_head_does(family, ablation, seeds):
    for seed in seeds:
        made = planted.refusing(seed, family)
        asked, harmless = refusals(planted.requests(seed)), refusals(planted.requests(seed, harmful=False))
        assert asked(made.model).all()
        assert not harmless(made.model).any()
        for head in HeadLayout.of(made.model).all():
            with ablate(made.model, HeadSet((head,)), ablation):
                assert asked(made.model).any() == (head != Head(*made.head))
                assert not harmless(made.model).any()


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_a_head_that_writes_something_else_is_no_refusal_head(family):
    for seed in SEEDS:
        made = planted.refusing(seed, family, shuffled=True)
        asked = refusals(planted.requests(seed))
        assert not asked(made.model).any()


def test_ships_is_the_divergence_of_transformers_own_logits():
    model = make("llama")
    prompts = Prompts.from_ids([[5, 9, 33, 20, 7, 8], [5, 9, 33, 20, 50]])
    found = ships(model, prompts, judge=None, ablation="zero")
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            p = model(input_ids=ids).logits[0, -1].double().softmax(-1)
            with ablate(model, "L1H2", "zero"):
                q = model(input_ids=ids).logits[0, -1].double().softmax(-1)
        assert abs(float((p * (p / q).log()).sum()) - float(found.per_prompt[number, 1, 2])) < 1e-6


def test_angles_are_exact_where_arccos_is_not():
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=random, dtype=torch.float64)).Q
    for turn in (1e-7, 1e-3, 0.3, 1.2):
        turned = math.cos(turn) * basis[:, 0] + math.sin(turn) * basis[:, 1]
        before = 5 * basis[:, :1] @ torch.randn(1, 40, generator=random, dtype=torch.float64)
        after = 3 * turned[:, None] @ torch.randn(1, 40, generator=random, dtype=torch.float64)
        assert angle(before, after) == pytest.approx(math.degrees(turn), rel=1e-6)
        # the sign of a singular vector means nothing
        assert angle(before, -after) == pytest.approx(math.degrees(turn), rel=1e-6)
    assert angle(basis[:, :3] @ torch.randn(3, 40, generator=random, dtype=torch.float64), before, 1) <= 90


def test_sahara_grows_greedily(tmp_path):
    model = make("llama", layers=2)
    prompts = Prompts.from_ids([[5, 9, 33, 20, 7, 8 + i] for i in range(6)])
    found = sahara(model, prompts, judge=None, size=3, n_random_sets=4, ablation="zero")
    assert len(found.ranking) == 3
    one, two = (sahara(model, prompts, judge=None, size=n, n_random_sets=1, ablation="zero") for n in (1, 2))
    assert found.ranking[:1] == one.ranking
    assert found.ranking[:2] == two.ranking
    groups = found.groups
    for size in (1, 2, 3):
        (group,) = groups.select("sahara", size)
        drawn = [*groups.select("random", size), *groups.select("random by layer", size)]
        assert len(drawn) == N_FREE_SETS + 4
        assert group.heads == found.heads(size)
        (degrees,), (apart,) = group.values["degrees"], group.values["one_minus_cos"]
        assert apart == pytest.approx(1 - math.cos(math.radians(degrees)), abs=1e-9)
        # the interval of one group is the one it holds; over draws it is the least and the largest
        assert groups.mean("sahara", size=size) == (degrees, *group.intervals["degrees"])
        angles = [trial.values["degrees"][0] for trial in groups.select("random", size)]
        assert groups.mean("random", size=size) == (pytest.approx(sum(angles) / N_FREE_SETS), min(angles), max(angles))
        assert degrees >= max(angles) or size > 1
        assert not any(trial.heads & group.heads for trial in drawn)
    again = SaharaResult.load(found.save(tmp_path / "sahara"))
    assert again.ranking == found.ranking
    assert again.groups.trials == groups.trials
    assert torch.equal(again.scores.per_prompt, found.scores.per_prompt)
    assert str(found).startswith(f"sahara: {found.ranking[0]}")
    with pytest.raises(UsageError, match="give 1 to 3"):
        found.heads(4)


def test_a_curve_compares_rankings_with_random_heads(tmp_path):
    made = planted.refusing(3, "llama")
    rows = planted.requests(3)
    calls = []

    def asked(model):
        calls.append(1)
        return refusals(rows)(model)

    def harmless(model):
        return 1 - refusals(planted.requests(3, harmful=False))(model)

    scores = ships(made.model, encoded(rows), judge=None)
    lowest = scores.top(12)[::-1]
    settings = {"sizes": (1, 2), "n_random_sets": 2, "until": 0.5, "folder": tmp_path, "about": rows}
    rankings = {"ships": scores, "lowest first": lowest}
    measures = {"refused": asked, "answers": harmless}
    found = causal_curve(made.model, rankings, measures, **settings)
    assert found.mean("baseline", "refused").mean == 1.0
    assert found.mean("ships", "refused").mean == 0
    # a ranking ends once the measure is down
    assert found.sizes("ships") == (1,)
    assert found.sizes("lowest first") == (1, 2)
    for ranking in ("lowest first", "random"):
        assert found.mean(ranking, "refused", size=2).mean == 1
    # the sets of a test are drawn from all heads of a layer, so some have the planted head
    for trial in found.select("random by layer", 2):
        assert all(value == (Head(*made.head) not in trial.heads) for value in trial.values["refused"])
    assert found.mean("ships", "answers", size=1).mean == 1
    assert found.gain("ships", "refused", over="random").mean == -1.0
    assert found.gain("lowest first", "refused", size=2, over="baseline").mean == 0.0
    with pytest.raises(UsageError, match="no trial of 'ships' with heads 2"):
        found.gain("ships", "refused", size=2)
    # the same heads drawn twice are measured once
    assert len(calls) == len({trial.heads for trial in found.trials})
    before = len(calls)
    again = causal_curve(made.model, rankings, measures, **settings)
    assert len(calls) == before
    assert again.trials == found.trials
    assert "random by layer" in str(found)
    drawn = [trial for trial in found.trials if trial.condition.startswith("random")]
    tested = {(trial.condition, trial.size): set(trial.heads) for trial in found.trials if trial not in drawn}
    assert {trial.matched for trial in drawn} == {"ships", "lowest first"}
    free = [trial for trial in drawn if trial.condition == "random"]
    assert not any(set(trial.heads) & tested[trial.matched, trial.size] for trial in free)


def three_ones(model):
    """A measure that heads do not change."""
    model(torch.tensor([[1, 2]]))
    return torch.ones(3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sizes": (0,)}, "give 1 to 6 heads"),
        ({"sizes": (7,)}, "give 1 to 6 heads"),
        ({"n_random_sets": 0}, "at least one"),
        ({"measures": {}}, "at least one"),
        ({"measures": {"nan": lambda model: torch.tensor([torch.nan])}}, "measure 'nan'"),
        ({"rankings": {"none": []}}, "too few heads"),
        ({"rankings": {"random": [Head(0, 1), Head(0, 2)]}}, "name of a control"),
        ({"rankings": {"twice": [Head(0, 1), Head(0, 1)]}}, "a head twice"),
        ({"folder": "cells"}, "needs about="),
    ],
)
def test_bad_curves(settings, text):
    model = planted.refusing(0).model
    given = {"rankings": {"some": list(HeadLayout.of(model).all())}, "sizes": (1,)} | settings
    measures = given.pop("measures", {"one": three_ones})
    with pytest.raises(UsageError, match=text):
        causal_curve(model, given.pop("rankings"), measures, **given)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 5}, "give 1 to 4 heads"),
        ({"components": 4}, "more such prompts than components"),
        ({"components": 0}, "at least 1 component"),
        ({"n_random_sets": 0}, "at least one random set"),
    ],
)
def test_bad_groups(settings, text):
    with pytest.raises(UsageError, match=text):
        sahara(make("llama"), Prompts.from_ids([[3, 4], [4, 5], [5, 6]]), judge=None, **settings)


def test_a_short_ranking_leaves_no_size_without_a_control():
    model = planted.refusing(0).model
    rankings = {"short": [Head(0, 1)], "long": [Head(1, 0), Head(1, 1)]}
    found = causal_curve(model, rankings, {"one": three_ones}, sizes=(1, 2), n_random_sets=1)
    assert found.sizes("random") == found.sizes("random by layer") == (1, 2)
    assert found.gain("long", "one", size=2).mean == 0.0
    with pytest.raises(UsageError, match="unknown measure 'two'"):
        found.mean("long", "two", size=2)


def test_a_measure_that_does_not_run_the_model_is_refused():
    model = planted.refusing(0).model
    with pytest.raises(ModelError, match="the model did not run inside the context"):
        causal_curve(model, {"some": [Head(0, 1)]}, {"one": lambda model: torch.ones(3)}, sizes=(1,))


def test_points_of_another_seed_are_not_taken_for_these(tmp_path):
    model = make("llama")
    reference = Prompts.from_ids([[3, 4, 5, 6], [9, 8, 7, 6], [20, 21, 22, 23]])
    ids = torch.tensor([[5, 9, 33, 20]])

    def first(model):
        with torch.no_grad():
            return model(input_ids=ids).logits[0, -1, :1]

    settings = {"sizes": (1,), "ablation": "resample", "reference": reference, "n_random_sets": 1, "about": 0}
    rankings, measures = {"one": [Head(0, 1)]}, {"first": first}
    fresh = {s: causal_curve(model, rankings, measures, seed=s, **settings).trials for s in range(4)}
    kept = {s: causal_curve(model, rankings, measures, seed=s, folder=tmp_path, **settings).trials for s in range(4)}
    assert kept == fresh
    assert len({str(fresh[s][1].values) for s in fresh}) > 1


def test_one_prompt_spans_a_line_that_cannot_turn():
    with pytest.raises(UsageError, match="1 prompts span no subspace"):
        sahara(make("llama"), Prompts.from_ids([[3, 4, 5]]), judge=None)


def asked(seed, harmful=3, harmless=2):
    """Requests with a tokenizer, whose reply to those with HARM reads as a refusal, and harmless ones between them."""
    refuse, answer = (planted.requests(seed, harmful=kind, batch=4) for kind in (True, False))
    rows = [row for pair in itertools.zip_longest(refuse[:harmful], answer[:harmless]) for row in pair if row]
    return Prompts.from_ids(rows, tokenizer=run_cases.refusing_tokenizer(), pad_id=planted.PAD)


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_only_refused_requests_count(family, tmp_path):
    made = planted.refusing(1, family)
    mixed, only = asked(1), asked(1, harmless=0)
    settings = {"ablation": "zero", "max_new_tokens": 3}
    scores = ships(made.model, mixed, folder=tmp_path, **settings)
    assert scores.per_prompt[:, 0, 0].isnan().tolist() == [False, True, False, True, False]
    assert (scores.counted, len(scores.labels)) == (3, 5)
    torch.testing.assert_close(scores.values, ships(made.model, only, judge=None, ablation="zero").values)
    assert scores.top(1) == [Head(*made.head)]
    again = ships(made.model, mixed, folder=tmp_path, **settings)
    assert torch.equal(again.per_prompt.nan_to_num(-1), scores.per_prompt.nan_to_num(-1))
    group = sahara(made.model, mixed, size=1, n_random_sets=1, **settings)
    known = sahara(made.model, only, judge=None, size=1, n_random_sets=1, ablation="zero")
    assert group.groups.trials == known.groups.trials
    assert group.scores.labels[0].startswith("3 of 5 prompts together")


def test_a_model_that_refuses_nothing_has_no_ranking():
    made = planted.refusing(1, "llama", shuffled=True)
    scores = ships(made.model, asked(1), max_new_tokens=3)
    assert (scores.counted, scores.top(5)) == (0, [])
    assert "no head has a score" in scores.summary()
    with pytest.raises(UsageError, match="0 prompts that the model refuses, of 5, span no subspace"):
        sahara(made.model, asked(1), max_new_tokens=3)
    with pytest.raises(UsageError, match="1 prompts that the model refuses, of 3, span no subspace"):
        sahara(planted.refusing(1, "llama").model, asked(1, harmful=1), max_new_tokens=3)


@pytest.mark.parametrize("method", [ships, sahara])
def test_replies_without_a_tokenizer_cannot_be_judged(method):
    with pytest.raises(UsageError, match="give prompts with a tokenizer, or judge=None"):
        method(make("llama"), Prompts.from_ids([[3, 4], [4, 5], [5, 6]]))


def test_both_are_at_the_front():
    assert interp.identify.ships is ships
    assert interp.identify.sahara is sahara
