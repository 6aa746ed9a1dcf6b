"""Losses of prompts: equal to transformers' own, whatever the batch, the padding, the chunks and open contexts."""

import pytest
import torch
from capture_oracle import prompts

from interp import steer
from interp.analyses.measures import losses
from interp.analyses.measures.losses import SpanLoss, batch_losses, token_losses
from interp.errors import PromptError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.edit.edit import steering
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs
from interp.testing import families

LENGTHS = (20, 33, 11)


def own_loss(model, prompt):
    """transformers' loss of one prompt without padding."""
    inputs = model_inputs(model, Prompts((prompt,)))
    with torch.no_grad():
        return model(**inputs, labels=inputs["input_ids"], use_cache=False).loss


@pytest.mark.parametrize("held", [1 << 25, 700], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_equals_the_models_own_loss(tiny_model, monkeypatch, name, held):
    monkeypatch.setattr(losses, "MAX_HELD_LOGITS", held)
    model, batch = tiny_model(name), prompts(LENGTHS)
    expected = torch.stack([own_loss(model, prompt) for prompt in batch])
    for size in (1, 2, 3):
        torch.testing.assert_close(token_losses(model, batch, size), expected, atol=1e-5, rtol=0)


def test_logits_are_never_held_whole(tiny_model, monkeypatch):
    monkeypatch.setattr(losses, "MAX_HELD_LOGITS", 3 * 5 * families.VOCAB)
    widths = []
    whole = losses._entropy
    monkeypatch.setattr(losses, "_entropy", lambda logits, wanted: widths.append(logits.shape) or whole(logits, wanted))
    token_losses(tiny_model("gemma2"), prompts(LENGTHS), 3)
    assert {tuple(shape) for shape in widths} == {(3, 5, families.VOCAB), (3, 2, families.VOCAB)}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_chunks_have_the_gradient_of_the_whole(tiny_model, monkeypatch, name):
    model, batch = tiny_model(name), prompts(LENGTHS)

    def mean(logits, batch):
        ids = batch.tensors()["input_ids"]
        rows = []
        for row, wanted, length in zip(logits, ids, batch.lengths, strict=True):
            rows.append(torch.nn.functional.cross_entropy(row[-length:-1], wanted[-length + 1 :]))
        return torch.stack(rows)

    weight = next(p for n, p in model.named_parameters() if "layers.0" in n or "h.0" in n)
    (expected,) = torch.autograd.grad(batch_losses(model, batch, mean).sum(), weight)
    monkeypatch.setattr(losses, "MAX_HELD_LOGITS", 700)
    (found,) = torch.autograd.grad(batch_losses(model, batch).sum(), weight)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_open_contexts_act(tiny_model):
    model, batch = tiny_model("qwen3"), prompts(LENGTHS)
    plain = token_losses(model, batch)
    with ablate(model, "L0H1, L1H2", "zero"):
        cut = token_losses(model, batch, 2)
    with steering(model, steer.Gate(factor=0.0, heads="L0H1, L1H2"), batch):
        gated = token_losses(model, batch)
    torch.testing.assert_close(cut, gated, atol=1e-6, rtol=0)
    assert (cut - plain).abs().min() > 1e-4
    with steering(model, steer.Boost("mark", 8.0), batch):
        boosted = token_losses(model, batch)
    assert (boosted - plain).abs().min() > 1e-5
    for kind in ("uniform", "first"):
        with ablate(model, HeadLayout.of(model).all(), kind):
            together, alone = token_losses(model, batch, 3), token_losses(model, batch, 1)
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_model_stays_as_it_was(tiny_model, monkeypatch):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    body, hooks = model.model, len(model.model._forward_hooks)
    logits = model(**model_inputs(model, batch)).logits

    def broken(*_):
        raise RuntimeError("in the head")

    monkeypatch.setattr(losses, "_entropy", broken)
    with pytest.raises(RuntimeError, match="in the head"):
        token_losses(model, batch)
    assert model.model is body
    assert len(body._forward_hooks) == hooks
    assert torch.equal(model(**model_inputs(model, batch)).logits, logits)


def test_a_loss_of_ones_own_and_what_is_wrong_with_it(tiny_model):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    found = token_losses(model, batch, 2, loss=lambda logits, batch: logits[:, -1, 5] - logits[:, -1, 6])
    inputs = model_inputs(model, batch[2:])
    expected = model(**inputs).logits[0, -1]
    torch.testing.assert_close(found[2], (expected[5] - expected[6]).detach(), atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match=r"batch of 3 prompts is \[\]; return one number for each prompt"):
        token_losses(model, batch, loss=lambda logits, batch: logits.mean())
    with pytest.raises(UsageError, match="batch of 3 prompts is float"):
        token_losses(model, batch, loss=lambda logits, batch: 0.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="prompt of 20 tokens is nan; give a loss that is finite"):
        token_losses(model, batch, loss=lambda logits, batch: logits[:, -1, 0] * torch.nan)
    with pytest.raises(PromptError, match="nothing is predicted"):
        token_losses(model, Prompts.from_ids([[5, 6], [5]]))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_loss_of_a_span_needs_few_logits(tiny_model, name):
    model = tiny_model(name)
    ids = [[5, 9, 33, 20, 7, 8, 11, 12], [3, 4, 5, 6, 7]]
    prompts = Prompts.from_ids(ids, spans=[{"second": (3, 6)}, {"second": (1, 2)}])
    loss = SpanLoss("second")
    assert loss.n_last(prompts) == 6
    found = token_losses(model, prompts, loss=loss)
    for row, value, (start, stop) in zip(ids, found, [(3, 6), (1, 2)], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[start - 1 : stop - 1], torch.tensor(row[start:stop]))
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
