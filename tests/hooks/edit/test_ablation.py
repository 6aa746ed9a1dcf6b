"""Ablations: each kind changes z as documented, in prefill and in decode."""

from typing import Any

import pytest
import torch
import tqdm.auto

from interp import steer
from interp.errors import HeadError, UsageError
from interp.hooks.edit.ablation import Intervention, ReferenceOutputs, ablate
from interp.hooks.edit.edit import steering
from interp.hooks.model.heads import HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, run
from interp.testing.families import FAMILIES, VOCAB


def prompts(lengths=(20, 26), seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Prompts.from_ids([torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths])


def read(model, batch, item, **settings):
    with capture(model, item, batch, **settings) as cap:
        run(model, batch)
    return cap[item]


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_changes_only_the_ablated_heads(tiny_model, name):
    model, batch = tiny_model(name), prompts()
    plain = read(model, batch, keep.z())
    with ablate(model, "L0H2", "zero"):
        cut = read(model, batch, keep.z())
    real = ~plain[:, 0, 0].isnan()
    assert (cut[:, 0, 2][real] == 0).all()
    others = [0, 1, 3]
    assert torch.equal(
        cut[:, 0, others][real[:, None].expand(-1, 3, -1, -1)], plain[:, 0, others][real[:, None].expand(-1, 3, -1, -1)]
    )
    assert torch.equal(read(model, batch, keep.z()).nan_to_num(), plain.nan_to_num())


@pytest.mark.parametrize("name", FAMILIES)
def test_uniform_and_first_change_attention_as_documented(tiny_model, name):
    model, batch = tiny_model(name), prompts()
    seen = read(model, batch, keep.pattern(), heads="L1H1") > 0
    with ablate(model, "L1H1", "uniform"):
        flat = read(model, batch, keep.pattern(), heads="L1H1")[1, 0, :26, :26]
    spread = seen[1, 0, :26, :26].float()
    shares = flat.sum(-1, keepdim=True)
    torch.testing.assert_close(flat, spread / spread.sum(-1, keepdim=True) * shares, atol=1e-6, rtol=1e-5)
    with ablate(model, "L1H1", "first"):
        first = read(model, batch, keep.pattern(), heads="L1H1")
    for b, length in enumerate(batch.lengths):
        assert (first[b, 0, :length, 1:] == 0).all()
        if name != "gpt_oss":
            torch.testing.assert_close(first[b, 0, :length, 0], torch.ones(length))


def test_mean_is_the_mean_over_reference_tokens(tiny_model):
    model, batch, reference = tiny_model("llama"), prompts(), prompts((12, 30, 7), seed=1)
    heads = ["L0H3", "L1H0"]
    alone = [read(model, reference[b : b + 1], keep.z(), heads=heads)[0] for b in range(len(reference))]
    mean = torch.cat(alone, 1).mean(1)
    with ablate(model, heads, "mean", reference=reference):
        found = read(model, batch, keep.z(), heads=heads)
    torch.testing.assert_close(found[1, :, :26], mean[:, None].expand(-1, 26, -1), atol=1e-6, rtol=1e-5)


def test_resample_takes_another_prompt_at_the_same_position(tiny_model):
    model, batch, reference = tiny_model("llama"), prompts(), prompts((40,), seed=1)
    with ablate(model, "L1H2", "resample", reference=reference):
        found = read(model, batch, keep.z(), heads="L1H2")
    theirs = read(model, reference, keep.z(), heads="L1H2")
    for b, length in enumerate(batch.lengths):
        torch.testing.assert_close(found[b, 0, :length], theirs[0, 0, :length])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["zero", "mean", "resample", "uniform", "first"])
def test_prefill_and_decode_are_ablated_alike(tiny_model, name, kind):
    model, batch = tiny_model(name), prompts()
    reference = prompts((40,), seed=1) if kind in ("mean", "resample") else None
    heads = "L0H1, L1H2"
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    with ablate(model, heads, kind, reference=reference):
        out = model.generate(**batch.tensors(), return_dict_in_generate=True, **settings)
    width = max(batch.lengths)
    whole = Prompts.from_ids([[*p.ids, *row[width:-1].tolist()] for p, row in zip(batch, out.sequences, strict=True)])
    with ablate(model, heads, kind, reference=reference):
        again = run(model, whole).logits[:, -6:]
    torch.testing.assert_close(torch.stack(out.logits, 1), again, atol=1e-4, rtol=1e-4)


def test_each_kind_moves_the_logits_and_leaves_nothing(tiny_model):
    model, batch = tiny_model("qwen2"), prompts()
    plain = run(model, batch).logits
    reference = prompts((40,), seed=1)
    seen = []
    for kind in ("zero", "mean", "resample", "uniform", "first"):
        with ablate(model, "L0H0", kind, reference=reference if kind in ("mean", "resample") else None):
            seen.append(run(model, batch).logits[1, -1])
        assert torch.equal(run(model, batch).logits, plain)
    for i, one in enumerate(seen):
        assert (one - plain[1, -1]).abs().max() > 1e-4
        assert all((one - other).abs().max() > 1e-5 for other in seen[:i])


def test_ablations_compose(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    with ablate(model, "L0H0", "uniform"), ablate(model, "L0H1", "first"), ablate(model, "L0H2", "zero"):
        nested = run(model, batch).logits
        z = read(model, batch, keep.z(), heads="L0H2")
    assert (z.nan_to_num() == 0).all()
    with ablate(model, "L0H2", "zero"), ablate(model, "L0H1", "first"), ablate(model, "L0H0", "uniform"):
        assert torch.equal(nested, run(model, batch).logits)


@pytest.mark.parametrize(
    ("heads", "kind", "more", "error", "text"),
    [
        ("L9H0", "zero", {}, HeadError, "layer 9 of a 2-layer model"),
        ("L0H0", "none", {}, UsageError, "unknown ablation 'none'; choose from 'zero', 'mean'"),
        ("L0H0", "mean", {}, UsageError, "needs reference prompts"),
        ("L0H0", "zero", {"reference": True}, UsageError, "takes no reference prompts"),
    ],
)
def test_bad_arguments(tiny_model, heads, kind, more, error, text):
    settings: dict[str, Any] = {"reference": prompts()} if more else {}
    with pytest.raises(error, match=text), ablate(tiny_model("llama"), heads, kind, **settings):
        pass


def test_a_capture_sees_the_ablated_z_in_either_order(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    with capture(model, keep.z(), batch, heads="L0H2") as outside, ablate(model, "L0H2", "zero"):
        run(model, batch)
    with ablate(model, "L0H2", "zero"), capture(model, keep.z(), batch, heads="L0H2") as inside:
        run(model, batch)
    assert (outside[keep.z()].nan_to_num() == 0).all()
    assert (inside[keep.z()].nan_to_num() == 0).all()


@pytest.mark.parametrize("kind", ["zero", "resample", "uniform", "first"])
def test_nothing_stays_after_ctrl_c(tiny_model, kind):
    from transformers import AttentionInterface

    model, batch = tiny_model("llama"), prompts()
    names = set(AttentionInterface._global_mapping)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    reference = prompts((40,), seed=1) if kind == "resample" else None
    with pytest.raises(KeyboardInterrupt), ablate(model, "L1H1", kind, reference=reference):  # noqa: PT012
        run(model, batch)
        raise KeyboardInterrupt
    assert names == set(AttentionInterface._global_mapping)
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    assert model.config._attn_implementation == "sdpa"


def test_a_gate_of_zero_is_an_ablation(tiny_model):
    model, batch = tiny_model("gpt2"), prompts()
    with ablate(model, "L0H1 L1H3", "zero"):
        expected = run(model, batch).logits
    with steering(model, steer.Gate(0.0, heads="L0H1 L1H3")):
        torch.testing.assert_close(run(model, batch).logits, expected)
    assert (run(model, batch).logits - expected).abs().max() > 1e-3


def test_reference_prompts_show_a_progress_bar_only_on_request(tiny_model, monkeypatch):
    model, shown = tiny_model("llama"), []

    class Noted(tqdm.auto.tqdm):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            shown.append(not self.disable)

    monkeypatch.setattr(tqdm.auto, "tqdm", Noted)
    change = Intervention("mean", reference=prompts())
    ReferenceOutputs.of(model, HeadSet.parse("L0H1"), change)
    with ablate(model, "L0H1", "mean", reference=prompts()):
        assert shown == [False, False]
        run(model, prompts())
    ReferenceOutputs.of(model, HeadSet.parse("L0H1"), change, progress=True)
    assert shown[-1]


def test_resample_beyond_the_end_of_a_prompt_takes_its_last_position(tiny_model):
    """Reference prompts of different lengths: what follows the shorter one is padding, which is never taken."""
    model, batch, reference = tiny_model("llama"), prompts(), prompts((40, 7), seed=1)
    theirs = read(model, reference, keep.z(), heads="L1H2")[:, 0]
    drawn = set()
    for seed in range(4):
        with ablate(model, "L1H2", "resample", reference=reference, seed=seed):
            found = read(model, batch, keep.z(), heads="L1H2")[:, 0]
        for b, length in enumerate(batch.lengths):
            places = (torch.arange(length).clamp(max=end - 1) for end in reference.lengths)
            expected = (theirs[r, place] for r, place in enumerate(places))
            same = [torch.allclose(found[b, :length], each, atol=1e-6) for each in expected]
            assert sum(same) == 1
            drawn.add(same.index(True))
    assert drawn == {0, 1}
