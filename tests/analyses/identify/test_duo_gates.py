"""DuoAttention: gates by their definition, planted heads, resuming, and the choice of heads."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from capture_oracle import prompts
from detectors import prompts as planted_prompts
from eager_calls import attending

from interp.analyses import tasks
from interp.analyses.identify._distillation import Settings, State, distillation
from interp.analyses.identify.duo_gates import duo_gates, duo_heads, gate_shares
from interp.analyses.results.head_list_formats import read_duo_attention, write_duo_attention
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ModelError, ScoreError, SpanError, UsageError
from interp.hooks.model.heads import HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.testing import planted

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


def literal_loss(model, prompt, gates, settings):
    """Squared distance to the model as it is, out = a full + (1 - a) stream written into its own eager attention."""
    n = len(prompt)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    near = (j < settings.sink) | (i - j < settings.recent)
    teacher = {}

    def as_it_is(own, module, *args, **given):
        out, pattern = own(module, *args, **given)
        teacher[module.layer_idx] = out
        return out, pattern

    def gated(own, module, q, k, v, mask, **given):
        out, pattern = own(module, q, k, v, mask, **given)
        full = teacher[module.layer_idx] if settings.full == "teacher" else out
        kept = pattern * near
        each = q.shape[1] // v.shape[1]
        stream = kept / kept.sum(-1, keepdim=True) @ v.repeat_interleave(each, 1)
        a = gates[module.layer_idx].repeat_interleave(each)[:, None]
        return a * full + (1 - a) * stream.transpose(1, 2), pattern

    def hidden(attention):
        with attending(model, attention):
            return model.base_model(torch.tensor([prompt.ids]), use_cache=False).last_hidden_state[0]

    ((start, stop),) = prompt.spans[settings.span]
    with torch.no_grad():
        wanted = hidden(as_it_is)
    return (wanted - hidden(gated))[start:stop].pow(2).mean()


def literal_gates(model, prompt, settings):
    """Gates [l g] after the steps on one prompt, AdamW written out."""
    layers, groups = model.config.num_hidden_layers, getattr(model.config, "num_key_value_heads", 4)
    gates, mean, square = torch.ones(layers, groups), 0.0, 0.0
    for t in range(settings.steps):
        at = gates.clamp(0, 1).requires_grad_()
        loss = literal_loss(model, prompt, at, settings) + settings.l1 * at.abs().mean()
        (slope,) = torch.autograd.grad(loss, at)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        step = mean / (1 - 0.9 ** (t + 1)) / ((square / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        gates = at.detach() - settings.rate(t) * step
    return gates.clamp(0, 1)


def check_loss_against_eager(model, batch, settings, seed=0):
    """Loss and slope of every gate, at gates drawn at random, on the first prompt."""
    layers, groups = model.config.num_hidden_layers, getattr(model.config, "num_key_value_heads", 4)
    gates = torch.rand(layers, groups, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    expected = literal_loss(model, batch[0], gates, settings)
    with distillation(model, batch[:1], gates, settings) as found:
        assert expected > 1e-3
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
        slopes = [torch.autograd.grad(loss, gates)[0] for loss in (found, expected)]
    assert slopes[1].abs().max() > 1e-3
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("full", ["teacher", "student"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_loss_and_slopes_equal_eager(tiny_model, name, full):
    check_loss_against_eager(tiny_model(name), marked((40,)), _settings(**SMALL, full=full))


@pytest.mark.parametrize("full", ["teacher", "student"])
def test_loss_and_slopes_equal_eager_on_the_demo_model(demo, full):
    model, tokenizer = demo
    batch = tasks.passkeys(tokenizer, n=1, lengths=(60,), keys=1, words=2, seed=1)
    check_loss_against_eager(model, batch, _settings(sink=4, recent=8, span="tail", full=full))


@pytest.mark.parametrize("full", ["teacher", "student"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_first_steps_follow_the_definition(tiny_model, name, full):
    model, batch = tiny_model(name), marked((30,))
    given: dict[str, Any] = {**SMALL, "steps": 3, "lr": 0.01, "l1": 0.2, "full": full}
    expected = literal_gates(model, batch[0], _settings(**given))
    assert expected.min() < 0.985
    torch.testing.assert_close(groups_of(duo_gates(model, batch, **given)), expected, atol=1e-4, rtol=0)


def test_first_steps_follow_the_definition_on_the_demo_model(demo):
    model, tokenizer = demo
    batch = tasks.passkeys(tokenizer, n=1, lengths=(60,), keys=1, words=2, seed=1)
    given: dict[str, Any] = {"sink": 4, "recent": 8, "steps": 2, "span": "tail"}
    expected = literal_gates(model, batch[0], _settings(**given, lr=0.02, l1=0.05))
    torch.testing.assert_close(groups_of(duo_gates(model, batch, **given)), expected, atol=1e-4, rtol=0)


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


def test_batches_are_padded_without_a_trace(tiny_model):
    model, batch = tiny_model("gemma3"), marked((40, 33, 28))
    gates, settings = torch.full((2, 2), 0.4), _settings(**SMALL)
    alone = []
    with torch.no_grad():
        with distillation(model, batch, gates, settings) as together:
            pass
        for i in range(3):
            with distillation(model, batch[i : i + 1], gates, settings) as loss:
                alone.append(loss)
    # every prompt has as many labelled tokens
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-6, rtol=1e-4)


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
    with pytest.raises(ScoreError, match=r"is broken .*; delete it and run again"):
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
    with pytest.raises(UsageError, match="unknown full 'both'; choose from 'teacher', 'student'"):
        duo_gates(model, batch, **SMALL, full="both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"steps=0, batch_size=1, lr=0.02, l1=0.05 are out of range"):
        duo_gates(model, batch, **SMALL, steps=0)
    with pytest.raises(UsageError, match="runs=0 is too small; train at least once"):
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
