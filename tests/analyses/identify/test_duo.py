"""DuoAttention: gates by their definition, planted heads, resuming, and the choice of heads."""

import math
from copy import deepcopy
from typing import Any

import planted
import pytest
import torch
from detectors import prompts as planted_prompts
from reading import eager_patterns, prompts

from interp.analyses.distillation import Settings, State, distillation
from interp.analyses.formats import read_duo_attention, write_duo_attention
from interp.analyses.identify.duo import duo_gates, duo_heads, gate_shares
from interp.analyses.scores import HeadScores
from interp.hooks.heads import HeadSet
from interp.hooks.prompts import Prompts
from interp.kernels.errors import ModelError, ScoreError, SpanError, UsageError

SMALL: dict[str, Any] = {"sink": 2, "recent": 5, "span": "mark"}


def marked(lengths=(40, 33, 28), seed=0):
    """Random tokens whose last ones carry the loss."""
    batch = prompts(lengths, seed)
    spans = [{"mark": (n - 8, n)} for n in lengths]
    return Prompts.from_ids([prompt.ids for prompt in batch], spans=spans)


def groups_of(scores):
    return scores.values.unflatten(1, (scores.kv_heads, -1)).amax(2)


@pytest.mark.parametrize(
    "family", [planted.FAMILIES[0], *(pytest.param(f, marks=pytest.mark.slow) for f in planted.FAMILIES[1:])]
)
def test_the_head_that_copies_from_afar_stays_open(family):
    """An induction head looks further back than the window; the head it leans on looks at the key before."""
    for seed in range(2):
        truth = planted.make("induction", seed, family)
        found = {}
        for shuffled in (False, True):
            # fresh tokens in the second half: nothing to look up, and the head rests on the first token
            batch = planted_prompts("induction", seed, shuffled=shuffled)
            found[shuffled] = duo_gates(
                truth.model, batch, sink=2, recent=6, steps=60, lr=0.05, l1=0.4, batch_size=2, span="second"
            )
        plain, control = found[False], found[True]
        layer, group = truth.head[0], truth.head[1] // (4 // plain.kv_heads)
        gates = groups_of(plain)
        assert gates[layer, group] > 0.9, f"seed {seed}: {gates}"
        gates[layer, group] = 0
        assert gates.max() < 0.1, f"seed {seed}: {gates}"
        assert groups_of(control)[layer, group] < 0.1, f"seed {seed}: {groups_of(control)}"
        chosen = duo_heads(plain, 1 / plain.layout.kv_heads / 3)
        assert truth.head in chosen
        assert len(chosen) == 4 // plain.kv_heads


def test_first_steps_follow_the_definition(tiny_model):
    """Two steps by hand: the loss from eager patterns of one layer's worth of change, AdamW written out."""
    model, batch = tiny_model("llama"), marked((30,))
    scores = duo_gates(model, batch, **SMALL, steps=2, lr=0.01, l1=0.2)
    # all gates 1: the student is the teacher, so that only the penalty moves them; of a first Adam step only the sign
    first = torch.ones(2, 2) - 0.01 * 1.0 * 1.0
    settings = _settings(**SMALL, steps=2, lr=0.01, l1=0.2)
    gates = first.clone().requires_grad_()
    lost = distillation(model, batch, gates, settings)
    (slope,) = torch.autograd.grad(lost + 0.2 * gates.abs().mean(), gates)
    one = torch.full((2, 2), 0.2 / 4)
    mean, square = 0.9 * 0.1 * one + 0.1 * slope, 0.999 * 0.001 * one**2 + 0.001 * slope**2
    step = mean / (1 - 0.9**2) / ((square / (1 - 0.999**2)).sqrt() + 1e-8)
    expected = (first - 0.01 * step).clamp(0, 1)
    torch.testing.assert_close(groups_of(scores), expected, atol=1e-6, rtol=0)


def _settings(**given):
    usual: dict[str, Any] = {
        "sink": 1,
        "recent": 1,
        "steps": 1,
        "lr": 0.1,
        "l1": 0.1,
        "full": "teacher",
        "span": "x",
        "batch_size": 1,
    }
    return Settings(**(usual | given))


def test_rate_rises_and_falls():
    rates = [_settings(steps=20, lr=1.0).rate(t) for t in range(20)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 14, 0.75, 0.5, 0.25])
    assert min(_settings(steps=200, lr=1.0).rate(t) for t in (0, 199)) == pytest.approx(0.1)


@pytest.mark.parametrize("full", ["teacher", "student"])
def test_distillation_equals_eager_masks(tiny_model, full):
    """With one layer's gates at 0, the student's z is made from the model's own eager pattern."""
    model, batch = tiny_model("llama"), marked((30,))
    gates = torch.ones(2, 2)
    gates[0] = 0
    settings = _settings(**SMALL, full=full)
    with torch.no_grad():
        lost = distillation(model, batch, gates, settings)
        pattern = eager_patterns(model, batch)[0, 0]
        i, j = torch.arange(30)[:, None], torch.arange(30)
        kept = pattern * ((j < 2) | (i - j < 5))
        values = {}
        block = model.model.layers[0].self_attn
        outs = []
        handles = [
            block.v_proj.register_forward_hook(lambda _, __, out: values.update(v=out)),
            model.model.norm.register_forward_hook(lambda _, __, out: outs.append(out)),
        ]
        model(torch.tensor([batch[0].ids]))
        v = values["v"].view(30, 2, 16).transpose(0, 1).repeat_interleave(2, 0)
        z = (kept / kept.sum(-1, keepdim=True) @ v).transpose(0, 1).flatten(1)[None]
        own = {}
        if full == "teacher":
            # later layers keep what they wrote in the teacher's run
            last = model.model.layers[1].self_attn.o_proj
            grab = last.register_forward_pre_hook(lambda _, args: own.update(z=args[0]))
            model(torch.tensor([batch[0].ids]))
            grab.remove()
            handles.append(last.register_forward_pre_hook(lambda _, args: (own["z"],)))
        handles.append(block.o_proj.register_forward_pre_hook(lambda _, args: (z,)))
        model(torch.tensor([batch[0].ids]))
        for handle in handles:
            handle.remove()
    expected = (outs[0] - outs[-1])[0, 22:].pow(2).mean()
    assert expected > 1e-3
    torch.testing.assert_close(lost, expected, atol=1e-5, rtol=1e-4)


def test_batches_are_padded_without_a_trace(tiny_model):
    model, batch = tiny_model("gemma3"), marked((40, 33, 28))
    gates, settings = torch.full((2, 2), 0.4), _settings(**SMALL)
    with torch.no_grad():
        together = distillation(model, batch, gates, settings)
        alone = torch.stack([distillation(model, batch[i : i + 1], gates, settings) for i in range(3)])
    # every prompt has as many labelled tokens
    torch.testing.assert_close(together, alone.mean(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_run_that_was_cut_ends_with_the_same_numbers(tiny_model, tmp_path, monkeypatch, cut):
    model, batch = tiny_model("llama"), marked()
    settings = {**SMALL, "steps": 8, "batch_size": 2, "runs": 2}
    whole = duo_gates(model, batch, **settings)
    advance, taken = State.advance, []

    def stops(self, *args):
        if len(taken) == cut:
            raise KeyboardInterrupt
        taken.append(1)
        advance(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(State, "advance", stops)
        with pytest.raises(KeyboardInterrupt):
            duo_gates(model, batch, **settings, folder=tmp_path)
    resumed = duo_gates(model, batch, **settings, folder=tmp_path)
    assert torch.equal(resumed.per_prompt, whole.per_prompt)
    assert resumed.labels == whole.labels
    # nothing is left to do
    with monkeypatch.context() as patch:
        patch.setattr(State, "advance", stops)
        assert torch.equal(duo_gates(model, batch, **settings, folder=tmp_path).per_prompt, whole.per_prompt)
    (first, _) = sorted(tmp_path.glob("duo-*.safetensors"))
    first.write_bytes(b"no tensors")
    with pytest.raises(ScoreError, match=r"is broken .*: delete it and run again"):
        duo_gates(model, batch, **settings, folder=tmp_path)


def test_rows_are_runs_with_seeds_of_their_own(tiny_model):
    model, batch = tiny_model("llama"), marked()
    both = duo_gates(model, batch, **SMALL, steps=4, l1=0.0, runs=2, seed=3)
    alone = [duo_gates(model, batch, **SMALL, steps=4, l1=0.0, seed=seed) for seed in (3, 4)]
    joined = HeadScores.concat(alone)
    assert torch.equal(both.per_prompt, joined.per_prompt)
    assert both.labels == joined.labels
    assert [label.split(",")[0] for label in both.labels] == ["seed 3", "seed 4"]
    assert alone[0].low.isnan().all()
    # a kv head's query heads share its gate
    pairs = both.per_prompt.unflatten(2, (2, 2))
    assert torch.equal(pairs[..., 0], pairs[..., 1])


def test_nothing_stays_on_the_model(tiny_model):
    model, batch = tiny_model("llama"), marked()
    weight = model.model.norm.weight.requires_grad_(False)
    try:
        with torch.inference_mode():
            duo_gates(model, batch, **SMALL, steps=2)
        assert not weight.requires_grad
        assert model.model.embed_tokens.weight.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(not module._forward_pre_hooks for module in model.modules())
        assert model.config._attn_implementation == "sdpa"
    finally:
        weight.requires_grad_(True)


def test_tables_travel_through_duo_attention_files(tiny_model, tmp_path):
    scores = duo_gates(tiny_model("llama"), marked(), **SMALL, steps=3)
    path = write_duo_attention(scores, tmp_path / "full_attention_heads.tsv")
    back = read_duo_attention(path, layout=scores.layout)
    assert torch.equal(back.values, scores.values)
    assert duo_heads(back, 0.5) == duo_heads(scores, 0.5)


def table(gates, heads=4):
    """Scores of [l g] gates, each given to the query heads of its group."""
    gates = torch.tensor(gates)
    return HeadScores("x", gates.repeat_interleave(heads // gates.shape[1], 1)[None], kv_heads=gates.shape[1])


def test_shares_of_gates_are_over_kv_heads(tmp_path):
    path = tmp_path / "full_attention_heads.tsv"
    # as published files hold them: some slightly below 0, multiples of a bfloat16
    path.write_text("-1.0e-04\t1.0\t9.609375e-01\t0.5\n1.5e-02\t0.25\t0.9\t0.75\n")
    for heads in (None, 8):
        shares = gate_shares(read_duo_attention(path, heads=heads))
        assert (shares.half, shares.open, shares.closed) == (5 / 8, 2 / 8, 2 / 8)
        assert shares.mean == pytest.approx((-1e-4 + 1 + 0.9609375 + 0.5 + 0.015 + 0.25 + 0.9 + 0.75) / 8)
    with pytest.raises(UsageError, match="'x' has heads without a score"):
        gate_shares(table([[math.nan, 1.0]]))


def test_heads_are_the_highest_quantile():
    scores = table([[0.9, 0.1], [0.3, 0.8]])
    assert duo_heads(scores, 0.25) == HeadSet.parse("L0H0-L0H1")
    assert duo_heads(scores, 0.5) == HeadSet.parse("L0H0-L0H1, L1H2-L1H3")
    assert duo_heads(scores, 0.75) == HeadSet.parse("L0H0-L0H1, L1H0-L1H3")
    # all alike: the seed decides, and as many are kept
    level = table([[1.0] * 4] * 5)
    drawn = [duo_heads(level, 0.5, seed=seed) for seed in range(4)]
    assert {len(heads) for heads in drawn} == {10}
    assert len(set(map(str, drawn))) == 4
    assert duo_heads(level, 0.5) == drawn[0]


def test_what_it_refuses(tiny_model):
    model, batch = tiny_model("llama"), marked()
    with pytest.raises(UsageError, match="full='both': the full branch is the 'teacher'"):
        duo_gates(model, batch, **SMALL, full="both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"steps=0, batch_size=1, lr=0.02, l1=0.05: give at least one step"):
        duo_gates(model, batch, **SMALL, steps=0)
    with pytest.raises(UsageError, match="runs=0: train at least once"):
        duo_gates(model, batch, **SMALL, runs=0)
    with pytest.raises(UsageError, match="sink=2, recent=0"):
        duo_gates(model, batch, sink=2, recent=0, span="mark")
    with pytest.raises(SpanError, match='has no span "tail"'):
        duo_gates(model, batch)
    with pytest.raises(ModelError, match="float16, whose gradients overflow"):
        duo_gates(deepcopy(model).half(), batch, **SMALL)
    with pytest.raises(ModelError, match="training mode"):
        duo_gates(deepcopy(model).train(), batch, **SMALL)
    with pytest.raises(UsageError, match=r"share=1 is not in \(0, 1\)"):
        duo_heads(table([[0.5, 0.5]]), 1)
