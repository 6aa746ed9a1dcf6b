"""Attention Lens: it learns, it is the unembedding before it does, and it belongs to one model."""

import json
from typing import Any

import pytest
import torch
from patching_oracle import make
from safetensors.torch import save_file

from interp.analyses.measures.head_outputs import HeadOutputs, bridged
from interp.analyses.views.attention_lens import Lens, lens_loss, train_lens
from interp.errors import CostError, HeadError, ModelError, ScoreError, UsageError
from interp.hooks.model.heads import Head, HeadLayout
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families


def prompts(n=24, seed=0, lengths=(5, 9, 12)):
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, families.VOCAB, (lengths[i % 3],), generator=rng).tolist() for i in range(n)]
    return Prompts.from_ids(ids)


def sharp(name="llama"):
    """A model whose next token is not the same for all prompts."""
    model = make(name)
    model.lm_head.weight.data *= 8
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_loss_falls(name):
    """On the prompts it was trained on, compared with the untrained lens."""
    model, batch = sharp(name), prompts()
    lens = train_lens(model, batch, 1, steps=120)
    assert len(lens.losses) == 120
    before, after = (lens_loss(model, batch, some) for some in (Lens.plain(model, 1), lens))
    assert before.shape == (24,)
    assert after.mean() < 0.5 * before.mean()
    assert sum(lens.losses[-6:]) < 0.6 * sum(lens.losses[:6])
    assert (after >= -1e-5).all()


def test_the_first_loss_is_that_of_the_plain_lens():
    model, batch = sharp(), prompts(8)
    lens = train_lens(model, batch, 0, steps=1, batch_size=8)
    assert lens.losses[0] == pytest.approx(float(lens_loss(model, batch, Lens.plain(model, 0)).mean()), rel=1e-4)


def test_divergence_by_hand():
    """KL(model || sum of heads) at the last position."""
    model, batch = sharp(), prompts(3)
    lens = train_lens(model, batch, 1, steps=5)
    found = lens_loss(model, batch, lens)
    for number, prompt in enumerate(batch):
        with torch.no_grad(), bridged(model) as tl:
            run = HeadOutputs.of(tl, Prompts((prompt,)), HeadLayout.of(model))
            x = run.read(run.heads[1])[:, 0]
            logits = model(torch.tensor([prompt.ids])).logits[0, -1]
        heads = [x[h] @ lens.of(Head(1, h))[0] + lens.of(Head(1, h))[1] for h in range(4)]
        made, wanted = torch.stack(heads).sum(0).softmax(-1), logits.softmax(-1)
        expected = (wanted * (wanted / made).log()).sum()
        assert float(found[number]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
        torch.testing.assert_close(lens(x[None])[0], torch.stack(heads).sum(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_lens_that_was_not_trained_is_the_unembedding_of_every_head(name):
    model = make(name)
    lens = Lens.plain(model, 1)
    assert lens.weight.shape == (4, 64, families.VOCAB)
    for h in range(4):
        weight, bias = lens.of(Head(1, h))
        assert torch.equal(weight, model.lm_head.weight.T)
        assert not bias.any()
    # its own copy
    lens.weight.zero_()
    assert model.lm_head.weight.any()


def test_a_seed_says_what_comes_out():
    model, batch = sharp(), prompts()
    one, again, other = (train_lens(model, batch, 1, steps=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight, again.weight)
    assert one.losses == again.losses != other.losses


def test_every_prompt_has_its_turn_before_one_comes_again():
    """Four steps of six prompts are all twenty-four, once each: their mean loss at a rate of next to nothing."""
    model, batch = sharp(), prompts()
    lens = train_lens(model, batch, 1, steps=4, batch_size=6, lr=1e-12)
    plain = lens_loss(model, batch, Lens.plain(model, 1))
    assert sum(lens.losses) / 4 == pytest.approx(float(plain.mean()), rel=1e-4)


def test_the_model_is_left_as_it_was():
    model, batch = sharp(), prompts(4)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    needed = [weight.requires_grad for weight in model.parameters()]
    with torch.no_grad():
        train_lens(model, batch, 1, steps=2)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert [weight.requires_grad for weight in model.parameters()] == needed
    assert all(weight.grad is None for weight in model.parameters())


def test_a_lens_comes_back_from_its_file(tmp_path):
    model = sharp()
    lens = train_lens(model, prompts(), 1, steps=3, seed=7)
    path = lens.save(tmp_path / "lens.v1")
    assert path == tmp_path / "lens.v1.safetensors"
    for again in (Lens.load(path), Lens.load(tmp_path / "lens.v1", model)):
        assert torch.equal(again.weight, lens.weight)
        assert torch.equal(again.bias, lens.bias)
        for name in ("layer", "losses", "settings", "provenance"):
            assert getattr(again, name) == getattr(lens, name)
    assert again.provenance.seed == 7
    assert again.settings["prompts"] == prompts().fingerprint()
    assert repr(lens).startswith("Lens(layer 1, 4 heads, 64 to 128, 3 steps, KL ")
    assert repr(Lens.plain(model, 0)) == "Lens(layer 0, 4 heads, 64 to 128, not trained)"
    assert [entry.name for entry in tmp_path.iterdir()] == ["lens.v1.safetensors"]


def test_another_model_is_refused(tmp_path):
    model, other = make("llama"), families.make("llama", seed=3)
    path = Lens.plain(model, 1).save(tmp_path / "lens")
    Lens.load(path, model)
    with pytest.raises(ScoreError, match=r"this lens belongs to .*weights \w+\), the model given is .*weights \w+\)"):
        Lens.load(path, other)
    with pytest.raises(ScoreError, match="this lens belongs to"):
        lens_loss(other, prompts(2), Lens.load(path))


def test_broken_files_are_refused(tmp_path):
    lens = Lens.plain(make("llama"), 1)
    with pytest.raises(ScoreError, match="cannot be read"):
        Lens.load(tmp_path / "nothing")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ScoreError, match="holds no lens"):
        Lens.load(junk)
    save_file({"weight": lens.weight}, junk)
    with pytest.raises(ScoreError, match=r"has the format None, expected 'interp\.lens/1'"):
        Lens.load(junk)
    about = {"layer": 1, "losses": [], "settings": {}, "provenance": lens.provenance.to_dict()}
    for tensors, header in (
        ({"weight": lens.weight}, about),
        ({"weight": lens.weight, "bias": lens.bias[:, :5].contiguous()}, about),
        ({"weight": lens.weight[0].contiguous(), "bias": lens.bias}, about),
        ({"weight": lens.weight, "bias": lens.bias}, {**about, "layer": "one"}),
        ({"weight": lens.weight, "bias": lens.bias}, {**about, "provenance": []}),
        ({"weight": lens.weight, "bias": lens.bias}, {"layer": 1}),
        ({"weight": lens.weight, "bias": lens.bias}, [1]),
    ):
        save_file(tensors, junk, {"format": "interp.lens/1", "about": json.dumps(header)})
        with pytest.raises(ScoreError):
            Lens.load(junk)


def test_bad_input(monkeypatch):
    model, batch = make("llama"), prompts(4)
    with pytest.raises(HeadError, match="layer 2 of a 2-layer model"):
        train_lens(model, batch, 2)
    with pytest.raises(HeadError, match="L0H1 is not in this lens"):
        Lens.plain(model, 1).of(Head(0, 1))
    bad: list[dict[str, Any]] = [{"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"batch_size": 0}]
    for setting in bad:
        with pytest.raises(UsageError, match="give a positive rate"):
            train_lens(model, batch, 1, **setting)
    with pytest.raises(UsageError, match="no prompts"):
        train_lens(model, batch[:0], 1)
    with pytest.raises(ModelError, match="training mode"):
        train_lens(families.make("llama").train(), batch, 1)
    monkeypatch.setattr("interp.analyses.views.attention_lens.free_memory", lambda device: 1000)
    with pytest.raises(CostError, match="a lens of 4 heads, 64 to 128, takes"):
        train_lens(model, batch, 1)
