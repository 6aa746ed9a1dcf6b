"""AttentionInfluence: repeated documents rank first when the induction head is ablated, not when random heads are."""

import pytest
import torch
from capture_oracle import prompts as random_prompts
from detectors import prompts
from tokenizers_tiny import byte_level

from interp.analyses import identify
from interp.analyses.measures.losses import token_losses
from interp.analyses.results.trials import Trials
from interp.errors import PromptError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.heads import HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.testing import planted


def influence(found, condition="heads"):
    """Influence [r p] of every draw on every document."""
    return torch.tensor([trial.values["influence"] for trial in found.select(condition)])


def ranking(found):
    """Numbers of the documents, the most influenced first."""
    return influence(found)[0].sort(descending=True, stable=True).indices.tolist()


def documents(seed):
    """Repeated texts at even numbers, texts without a repetition at odd ones."""
    pairs = zip(prompts("induction", seed), prompts("induction", seed, shuffled=True), strict=True)
    return Prompts(tuple(prompt for pair in pairs for prompt in pair), pad_id=planted.PAD)


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("ablation", ["uniform", "zero"])
def test_repeated_documents_rank_first(family, ablation):
    by_chance = 0
    for seed in range(5):
        truth = planted.make("induction", seed, family)
        # with its helper, so that no random head is one that the copy needs
        found = identify.attention_influence(
            truth.model, documents(seed), [truth.head, truth.helper], ablation=ablation, n_random_sets=3, seed=seed
        )
        assert {number % 2 for number in ranking(found)[:4]} == {0}, f"seed {seed}"
        repeated, fresh = influence(found)[0, ::2], influence(found)[0, 1::2]
        assert repeated.min() > 0.5 + fresh.max(), f"seed {seed}: {found}"
        for name in ("random", "random by layer"):
            # sets matched by layer may have the planted heads
            other = [not trial.heads & HeadSet.parse([truth.head, truth.helper]) for trial in found.select(name)]
            drawn = influence(found, name)[other]
            assert not len(drawn) or drawn.abs().max() < 0.1, f"seed {seed}: {found}"
            by_chance += sum({i % 2 for i in row.topk(4).indices.tolist()} == {0} for row in drawn)
    assert by_chance < 15, f"{by_chance} of 30 random draws set repeated documents apart"


def test_the_induction_head_alone_is_enough():
    truth = planted.make("induction", 0, "llama")
    scores = identify.induction(truth.model, prompts("induction", 50))
    found = identify.attention_influence(truth.model, documents(0), scores, share=0.05)
    assert found.select("heads")[0].heads == HeadSet.parse([truth.head])
    assert {number % 2 for number in ranking(found)[:4]} == {0}


def test_numbers_are_those_of_the_losses(tiny_model, tmp_path):
    model, batch = tiny_model("llama"), random_prompts((20, 33, 11))
    settings = {"ablation": "zero", "n_random_sets": 2, "batch_size": 2}
    found = identify.attention_influence(model, batch, "L0H1, L1H3", **settings)
    base = token_losses(model, batch)
    assert found.conditions == ("heads", "random", "random by layer", "baseline")
    assert found.select("baseline")[0].values["influence"] == (0.0, 0.0, 0.0)
    for condition in ("heads", "random", "random by layer"):
        trials = found.select(condition)
        assert len(trials) == (1 if condition == "heads" else 2)
        for trial in trials:
            with ablate(model, trial.heads, "zero"):
                ablated = token_losses(model, batch)
            torch.testing.assert_close(torch.tensor(trial.values["loss"]), ablated, atol=1e-6, rtol=0)
            expected = (ablated - base) / base
            torch.testing.assert_close(torch.tensor(trial.values["influence"]), expected, atol=1e-6, rtol=0)
    mean, low, high = found.mean("heads", "influence")
    assert low <= mean <= high
    assert mean == pytest.approx(float(influence(found).mean()))
    assert str(found).splitlines()[0].startswith("heads")
    assert Trials.load(found.save(tmp_path / "influence")).trials == found.trials
    kept = [
        identify.attention_influence(model, batch, "L0H1, L1H3", folder=tmp_path / "parts", **settings)
        for _ in range(2)
    ]
    assert [one.trials for one in kept] == [found.trials] * 2


def test_texts_and_bad_input(tiny_model):
    model, tokenizer = tiny_model("llama"), byte_level()
    texts = ["abcabcabcabc", "mnopqruvwxyz"]
    found = identify.attention_influence(model, texts, "L0H1, L1H3", tokenizer=tokenizer, n_random_sets=1)
    same = identify.attention_influence(model, Prompts.encode(tokenizer, texts), "L0H1, L1H3", n_random_sets=1)
    assert found.trials == same.trials
    assert found.questions == ("0", "1")
    with pytest.raises(UsageError, match="there is no tokenizer"):
        identify.attention_influence(model, ["abc"], "L0H1")
    with pytest.raises(UsageError, match="share=0"):
        identify.attention_influence(model, ["abc"], "L0H1", share=0.0, tokenizer=tokenizer)
    with pytest.raises(PromptError, match="nothing is predicted"):
        identify.attention_influence(model, Prompts.from_ids([[5]]), "L0H1")
    with pytest.raises(UsageError, match="no heads to ablate"):
        identify.attention_influence(model, Prompts.from_ids([[5, 6]]), HeadSet(()))
