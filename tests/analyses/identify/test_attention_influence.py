"""AttentionInfluence: copies rank first when the heads that copy are masked, and not when random ones are."""

import pickle

import pytest
import torch
from capture_oracle import prompts as random_prompts
from detectors import prompts
from tokenizers_tiny import byte_level

from interp.analyses import identify
from interp.analyses.identify.attention_influence import Influence
from interp.analyses.measures.losses import token_losses
from interp.errors import PromptError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.heads import HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.testing import planted


def documents(seed):
    """Repeated texts at even numbers, texts without a repetition at odd ones."""
    pairs = zip(prompts("induction", seed), prompts("induction", seed, shuffled=True), strict=True)
    return Prompts(tuple(prompt for pair in pairs for prompt in pair), pad_id=planted.PAD)


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("kind", ["uniform", "zero"])
def test_repeated_documents_rank_first(family, kind):
    by_chance = 0
    for seed in range(5):
        truth = planted.make("induction", seed, family)
        # with its helper, so that no random head is one that the copy needs
        found = identify.attention_influence(
            truth.model, documents(seed), [truth.head, truth.helper], kind=kind, seed=seed
        )
        assert {number % 2 for number in found.ranking[:4]} == {0}, f"seed {seed}"
        repeated, fresh = found.values[::2], found.values[1::2]
        assert repeated.min() > 0.5 + fresh.max(), f"seed {seed}: {found}"
        for name in ("random", "random by layer"):
            drawn = found.control(name)
            assert drawn.abs().max() < 0.1, f"seed {seed}: {found}"
            by_chance += sum({i % 2 for i in row.topk(4).indices.tolist()} == {0} for row in drawn)
    assert by_chance < 15, f"{by_chance} of 30 random draws set repeated documents apart"


def test_the_induction_head_alone_is_enough():
    truth = planted.make("induction", 0, "llama")
    scores = identify.induction(truth.model, prompts("induction", 50))
    found = identify.attention_influence(truth.model, documents(0), scores, share=0.05)
    assert found.heads == HeadSet.parse([truth.head])
    assert {number % 2 for number in found.ranking[:4]} == {0}


def test_numbers_are_those_of_the_losses(tiny_model):
    model, batch = tiny_model("llama"), random_prompts((20, 33, 11))
    found = identify.attention_influence(model, batch, "L0H1, L1H3", kind="zero", draws=2, batch_size=2)
    base = token_losses(model, batch)
    with ablate(model, "L0H1, L1H3", "zero"):
        masked = token_losses(model, batch)
    torch.testing.assert_close(found.base, base, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.values, (masked - base) / base, atol=1e-6, rtol=0)
    assert {name: drawn.shape for name, drawn in found.controls.items()} == {
        "random": (2, 3),
        "random by layer": (2, 3),
    }
    same = pickle.loads(pickle.dumps(found))
    assert same.to_dict() == found.to_dict()
    told = found.to_dict()
    assert told["heads"] == ["L0H1", "L1H3"]
    assert [row["rank"] for row in told["documents"]] == [found.ranking.index(i) for i in range(3)]
    assert told["documents"][1]["influence"] == pytest.approx(float(found.values[1]))
    assert str(found).splitlines()[0].startswith("heads")
    mean, low, high = found.group()
    assert low <= mean <= high
    assert mean == pytest.approx(float(found.values.mean()))


def test_influence_is_relative_to_the_base():
    found = Influence(HeadSet(()), "zero", torch.tensor([2.0, 4.0]), torch.tensor([3.0, 4.0]), {})
    assert found.values.tolist() == [0.5, 0.0]
    assert found.ranking == [0, 1]
    with pytest.raises(UsageError, match="control 'random' is none"):
        found.control()


def test_texts_and_what_is_wrong_with_them(tiny_model):
    model, tokenizer = tiny_model("llama"), byte_level()
    texts = ["abcabcabcabc", "mnopqruvwxyz"]
    found = identify.attention_influence(model, texts, "L0H1, L1H3", tokenizer=tokenizer, draws=1)
    same = identify.attention_influence(model, Prompts.encode(tokenizer, texts), "L0H1, L1H3", draws=1)
    assert torch.equal(found.values, same.values)
    assert found.labels == ("0", "1")
    with pytest.raises(UsageError, match="there is no tokenizer"):
        identify.attention_influence(model, ["abc"], "L0H1")
    with pytest.raises(UsageError, match="share=0"):
        identify.attention_influence(model, ["abc"], "L0H1", share=0.0, tokenizer=tokenizer)
    with pytest.raises(PromptError, match="nothing is predicted"):
        identify.attention_influence(model, Prompts.from_ids([[5]]), "L0H1")
    with pytest.raises(UsageError, match="no heads to take out"):
        identify.attention_influence(model, Prompts.from_ids([[5, 6]]), HeadSet(()))
