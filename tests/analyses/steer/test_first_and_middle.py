"""What KeyScale does that ZeroTuning does not, and biases of slots as they are measured."""

from dataclasses import replace

import pytest
import torch
from steering_oracle import key_scale, literal

from interp import steer
from interp.errors import SpanError
from interp.hooks.edit.edit import Edits, steering
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import capture, model_inputs, run
from interp.hooks.read.keep import mass, pattern
from interp.testing.families import VOCAB

DOCUMENTS = {"one": (2, 6), "two": (6, 12), "three": (13, 17)}


def batch(lengths=(20, 24), seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths]
    return Prompts.from_ids(ids, spans=[DOCUMENTS] * len(lengths))


def read(model, keep, prompts, edit=None):
    with steering(model, edit or Edits(), prompts), capture(model, keep, prompts) as cap:
        run(model, prompts)
    return cap[keep]


def test_a_longer_key_raises_the_first_token_for_some_queries_and_lowers_it_for_others(tiny_model):
    model, prompts = tiny_model("llama"), batch((24,))
    moved = {}
    for edit in (steer.KeyScale(1.5, heads="L0"), steer.ZeroTuning(1.5, heads="L0")):
        moved[edit] = (read(model, mass(0), prompts, edit) - read(model, mass(0), prompts))[:, 0, :, 1:]
    first, other = moved.values()
    assert first.max() > 1e-2
    assert first.min() < -1e-2
    assert other.min() >= 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_flow_through_a_scaled_key(tiny_model, family):
    model, prompts = tiny_model(family, attn_implementation="eager"), batch((20,))
    weights = dict(model.named_parameters())
    some = [weights[name] for name in weights if "k_proj.weight" in name or "q_proj.weight" in name]

    def gradients():
        loss = model(**model_inputs(model, prompts), use_cache=False).logits.square().mean()
        return torch.autograd.grad(loss, some)

    first = torch.arange(20)[None] == 0
    with literal(model, keys=lambda layer, key: key_scale(key, first, 1.5)):
        expected = gradients()
    with steering(model, steer.KeyScale(1.5), prompts):
        found = gradients()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_slot_bias_is_attention_per_token_after_the_documents(tiny_model):
    model, prompts = tiny_model("llama"), batch()
    found = steer.slot_bias(model, prompts, list(DOCUMENTS))
    assert found.shape == (2, 4, 3)
    whole = [read(model, pattern(), prompts[i : i + 1])[0, :, :, 17:] for i in range(2)]
    expected = [
        torch.stack([p[..., start:stop].sum(-1).mean(-1) / (stop - start) for start, stop in DOCUMENTS.values()], -1)
        for p in whole
    ]
    torch.testing.assert_close(found, torch.stack(expected).mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(steer.slot_bias(model, prompts, list(DOCUMENTS), batch_size=2), found)


def test_documents_that_end_at_different_places_are_measured_prompt_by_prompt(tiny_model):
    model, plain = tiny_model("llama"), batch((20, 26, 23))
    shifted = [{name: ((start + i, stop + i),) for name, (start, stop) in DOCUMENTS.items()} for i in (0, 4, 2)]
    items = tuple(replace(prompt, spans=spans) for prompt, spans in zip(plain, shifted, strict=True))
    prompts = replace(plain, items=items)
    alone = torch.stack([steer.slot_bias(model, prompts[i : i + 1], list(DOCUMENTS)) for i in range(3)])
    for size in (1, 2, 3):
        found = steer.slot_bias(model, prompts, list(DOCUMENTS), batch_size=size)
        torch.testing.assert_close(found, alone.mean(0), atol=1e-6, rtol=1e-5)


def test_documents_no_better_than_dummies_share_evenly(tiny_model):
    model, prompts = tiny_model("llama"), batch((18,))
    # one row after the documents: what it gives is the bias itself
    slots = steer.slot_bias(model, prompts, list(DOCUMENTS))
    edit = steer.FoundInTheMiddle(list(DOCUMENTS), slots, temperature=0.01, clip=50.0, heads="L0")
    before, after = (read(model, mass(*DOCUMENTS), prompts, e)[0, 0, :, -1] for e in (None, edit))
    tokens = torch.tensor([stop - start for start, stop in DOCUMENTS.values()])
    torch.testing.assert_close(after.sum(-1), before.sum(-1))
    torch.testing.assert_close(after / tokens, (before.sum(-1, keepdim=True) / tokens.sum()).expand(-1, 3))
    assert (before - after).abs().max() > 1e-3


def test_the_papers_temperature_takes_one_document(tiny_model):
    model, prompts = tiny_model("llama"), batch()
    edit = steer.FoundInTheMiddle(list(DOCUMENTS), [0.0, 0.0, 0.0], clip=50.0)
    shares = read(model, mass(*DOCUMENTS), prompts, edit)[0, 0, :, 17:20]
    assert (shares.amax(-1) / shares.sum(-1)).min() > 0.99


def test_dummies_need_a_question_after_them(tiny_model):
    with pytest.raises(SpanError, match="no token after the last of one, three"):
        steer.slot_bias(tiny_model("llama"), batch((17,)), ["one", "three"])
    with pytest.raises(SpanError, match='no span "four"'):
        steer.slot_bias(tiny_model("llama"), batch(), ["one", "four"])
