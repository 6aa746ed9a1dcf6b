"""Which pairs a patching counts, what it divides by, and that an interrupted patching continues."""

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from patching_oracle import CLEAN, RIGHT, WRONG, answered, at, close, log_probability, shown

from interp.analyses import identify
from interp.analyses.identify._prompt_pairs import scored
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError

PAIRED = (identify.activation_patching, identify.attribution_patching, identify.path_patching)


@pytest.mark.parametrize("method", PAIRED)
def test_a_pair_without_the_behaviour_does_not_count(method, tiny_model):
    """Equal sides, and sides that are exchanged, with and without division: the others are as if alone."""
    model = tiny_model("llama")
    clean, corrupt = shown(model)
    mixed = [clean[0], corrupt[1], clean[2]], [clean[0], clean[1], corrupt[2]]
    for normalize in (True, False):
        scores = method(model, *(replace(clean, items=tuple(side)) for side in mixed), normalize=normalize)
        assert scores.counted == 1
        assert scores.per_prompt[:2].isnan().all()
        only = method(model, clean[2:], corrupt[2:], normalize=normalize)
        close(scores.values, only.values)
        means = [each.settings.get("mean_difference") for each in (scores, only)]
        assert means == [None, None] if not normalize else means[0] == pytest.approx(means[1], rel=1e-5)
        close(scores.extras["difference"][1, 0, 0], torch.tensor(at(model, corrupt[1]) - at(model, clean[1])))


@pytest.mark.parametrize("method", PAIRED)
def test_a_weak_pair_does_not_rule_the_others(method, tiny_model):
    """Where the metric of the second pair is scaled to nearly 0, the scores are those of the first one."""
    model = tiny_model("llama")
    clean, corrupt = shown(model)

    def scaled(logits, prompts):
        values = logits[:, RIGHT] - logits[:, WRONG]
        return values * torch.tensor([1e-4 if prompt.ids == clean[1].ids else 1.0 for prompt in prompts])

    both, strong = method(model, clean[:2], corrupt[:2], scaled), method(model, clean[:1], corrupt[:1])
    close(both.values, strong.values, atol=1e-3)


def test_scores_are_a_ratio_of_means():
    """By a literal loop, with one pair of a small difference, one without and one of the wrong sign."""
    effect = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    clean, corrupt = torch.tensor([2.0, 1.001, 0.5, 1.0, 7.0]), torch.tensor([1.0, 1.0, 0.5, 3.0, 4.0])
    scores, mean = scored(effect, clean, corrupt, True)
    counted = [0, 1, 4]
    table = HeadScores("patching", scores)
    for layer, head in itertools.product(range(2), range(3)):
        total = sum(float(effect[n, layer, head]) for n in counted)
        difference = sum(float(clean[n] - corrupt[n]) for n in counted)
        assert table[layer, head] == pytest.approx(total / difference, rel=1e-5)
    assert (table.counted, mean) == (3, pytest.approx(4.001 / 3))
    # a ratio for each pair would give nearly all of the weight to the second one
    ratios = (effect[counted] / (clean - corrupt)[counted, None, None]).abs().flatten(1).sum(1)
    assert ratios[1] / ratios.sum() > 0.99
    shares = table.per_prompt[counted].abs().flatten(1).sum(1)
    assert shares[1] / shares.sum() < 0.6
    raw, _ = scored(effect, clean, corrupt, False)
    torch.testing.assert_close(raw[counted], effect[counted])
    assert raw[[2, 3]].isnan().all()


@pytest.mark.parametrize("method", PAIRED)
@pytest.mark.parametrize("normalize", [True, False])
def test_no_pair_with_the_behaviour_gives_no_ranking(method, normalize, tiny_model):
    model = tiny_model("llama")
    corrupt, clean = shown(model)
    scores = method(model, clean, corrupt, normalize=normalize)
    assert scores.counted == 0
    assert scores.values.isnan().all()
    assert scores.top(5) == []
    assert scores.settings.get("mean_difference") is None
    assert "no head has a score" in scores.summary()


def test_prompts_that_the_model_gets_wrong_do_not_count(tiny_model):
    model = tiny_model("llama")
    right = answered(model)
    answers = [right[0], right[1][::-1], right[2]]
    scores = identify.logit_attribution(model, CLEAN, answers)
    assert scores.counted == 2
    assert scores.per_prompt[1].isnan().all()
    close(scores.per_prompt[[0, 2]], identify.logit_attribution(model, CLEAN, right).per_prompt[[0, 2]])
    none = identify.logit_attribution(model, CLEAN, [pair[::-1] for pair in right])
    assert (none.counted, none.top(5)) == (0, [])
    by_meta = identify.logit_attribution(model, CLEAN)
    assert by_meta.per_prompt[:, 0, 0].isnan().tolist() == [at(model, prompt) < 0 for prompt in CLEAN]


@pytest.mark.parametrize("method", PAIRED)
def test_batches_change_no_number_and_parts_are_not_joined(method, tiny_model):
    model = tiny_model("llama")
    pairs = shown(model)
    whole = method(model, *pairs, batch_size=64)
    for size in (1, 2):
        close(method(model, *pairs, batch_size=size).per_prompt, whole.per_prompt, atol=1e-5)
    parts = [method(model, *(side[part] for side in pairs)) for part in (slice(0, 1), slice(1, 3))]
    with pytest.raises(ScoreError, match="differ in settings"):
        HeadScores.concat(parts)


@pytest.mark.parametrize("method", PAIRED)
def test_an_interrupted_patching_continues_with_the_same_numbers(method, tiny_model, tmp_path):
    model = tiny_model("llama")
    clean, corrupt = shown(model)
    whole = method(model, clean, corrupt, batch_size=1)
    get, left = Parts.get, [2]

    def dying(self, piece, make):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return get(self, piece, make)

    with mock.patch.object(Parts, "get", dying), pytest.raises(KeyboardInterrupt):
        method(model, clean, corrupt, batch_size=1, folder=tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 2
    again = method(model, clean, corrupt, batch_size=1, folder=tmp_path)
    assert torch.equal(again.per_prompt, whole.per_prompt)
    assert again.settings == whole.settings
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(tmp_path.iterdir())) == 3
    # what other pairs, another metric or another direction would give is never taken from these files
    other = method(model, clean, corrupt, log_probability, batch_size=1, folder=tmp_path, normalize=False)
    torch.testing.assert_close(
        other.per_prompt, method(model, clean, corrupt, log_probability, normalize=False).per_prompt, equal_nan=True
    )
    assert len(list(tmp_path.iterdir())) == 6
