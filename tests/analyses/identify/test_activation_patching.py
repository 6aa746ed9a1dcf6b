"""Patching and attribution: TransformerLens' numbers, those of plain hooks on the model, and what comes out whole."""

import contextlib
import itertools
import math

import pytest
import torch
from bridges import FAMILIES
from patching_oracle import (
    CLEAN,
    CORRUPT,
    HEADS,
    LAYERS,
    RIGHT,
    TWO,
    WRONG,
    answered,
    at,
    close,
    each_pair,
    hooked,
    log_probability,
    make,
    metric,
    projections,
    prompts,
    recorded,
    shown,
    swept,
)
from transformer_lens import patching
from transformer_lens.tools.analysis import attribution_patching as lens_attribution

import interp
from interp.analyses import identify
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ModelError, PromptError, UsageError
from interp.hooks.model.layers import attention_layers
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.transformerlens.bridge import bridge
from interp.testing import families

PAIRED = (identify.activation_patching, identify.attribution_patching, identify.path_patching)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@torch.no_grad()
def test_activation_patching_is_that_of_transformer_lens(name, direction, capsys):
    model = make(name)
    clean_side, corrupt_side = shown(model)
    found = identify.activation_patching(model, clean_side, corrupt_side, direction=direction, normalize=False)
    assert capsys.readouterr().err == ""
    with bridge(model) as tl:
        for number, (clean, corrupt) in enumerate(each_pair(clean_side, corrupt_side)):
            base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
            _, cache = tl.run_with_cache(source)
            values = patching.get_act_patch_attn_head_out_all_pos(tl, base, cache, metric) - metric(tl(base))
            close(found.per_prompt[number], values if direction == "denoise" else -values)
    assert found.per_prompt.abs().max() > 1e-3
    assert (found.unit, found.settings["direction"], len(found.labels)) == ("metric", direction, 3)


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_activation_patching_by_plain_hooks(name, batch_size):
    model = make(name)
    clean_side, corrupt_side = shown(model)
    mean = sum(at(model, one) - at(model, other) for one, other in zip(clean_side, corrupt_side, strict=True)) / 3
    for direction in ("denoise", "noise"):
        found = identify.activation_patching(
            model, clean_side, corrupt_side, direction=direction, batch_size=batch_size
        )
        for number, (clean, corrupt) in enumerate(each_pair(clean_side, corrupt_side)):
            base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
            values, at_base, at_source = swept(model, base, source)
            at_clean, at_corrupt = (at_source, at_base) if direction == "denoise" else (at_base, at_source)
            effect = values - at_corrupt if direction == "denoise" else at_clean - values
            close(found.per_prompt[number], effect / mean, atol=1e-4)
            close(found.extras["difference"][number], (at_clean - at_corrupt).expand(LAYERS, HEADS))


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("weights", [True, False])
def test_attribution_patching_by_autograd(name, direction, weights):
    model = make(name).requires_grad_(weights)
    clean_side, corrupt_side = shown(model)
    with torch.no_grad():
        found = identify.attribution_patching(model, clean_side, corrupt_side, direction=direction, normalize=False)
    assert all(weight.grad is None for weight in model.parameters())
    for number, (clean, corrupt) in enumerate(each_pair(clean_side, corrupt_side)):
        z_clean, _ = recorded(model, clean, projections(model))
        z_corrupt, _ = recorded(model, corrupt, projections(model))
        here = z_corrupt if direction == "denoise" else z_clean
        # what is added to z has the gradient of z
        added = [torch.zeros_like(z, requires_grad=True) for z in here]
        with hooked(projections(model), lambda i, z, added=added: z + added[i]):
            value = metric(model(corrupt if direction == "denoise" else clean).logits)
        gradients = torch.autograd.grad(value, added)
        for layer, gradient in enumerate(gradients):
            product = (z_clean[layer] - z_corrupt[layer]) * gradient
            close(found.per_prompt[number, layer], product.unflatten(-1, (HEADS, -1)).sum((0, 1, 3)))


@pytest.mark.parametrize("name", FAMILIES)
def test_attribution_patching_is_that_of_transformer_lens(name):
    model = make(name)
    clean_side, corrupt_side = shown(model)
    found = identify.attribution_patching(model, clean_side, corrupt_side, normalize=False)
    with bridge(model) as tl:
        for number, (clean, corrupt) in enumerate(each_pair(clean_side, corrupt_side)):
            expected = torch.zeros(LAYERS, HEADS)
            config = lens_attribution.EdgeAttributionConfig(granularity="node")
            for node, score in lens_attribution.attribution_patch(
                tl, clean, corrupt, metric, config
            ).node_scores.items():
                if node.kind == "attn_head_out":
                    expected[node.layer, node.head] += score
            close(found.per_prompt[number], expected)


def test_attribution_is_patching_where_the_metric_is_linear_in_z():
    """In a last layer without an MLP whose heads write so little that the final norm does not see them."""
    model = make("gpt2")
    model.transformer.h[1].attn.c_proj.weight.data *= 0.05
    model.transformer.h[1].mlp.c_proj.weight.data.zero_()
    pairs = shown(model)
    exact, linear = (
        f(model, *pairs, normalize=False).per_prompt[:, 1]
        for f in (identify.activation_patching, identify.attribution_patching)
    )
    torch.testing.assert_close(linear, exact, atol=1e-7, rtol=0.01)
    assert exact.abs().max() > 1e-5


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_path_patching_moves_the_last_residual_by_what_the_head_writes(name, direction):
    model = make(name)
    clean_side, corrupt_side = shown(model)
    found = identify.path_patching(model, clean_side, corrupt_side, direction=direction, normalize=False)
    core, heads = model.base_model, projections(model)
    blocks, norm = (core.h, core.ln_f) if name == "gpt2" else (core.layers, core.norm)
    for number, (clean, corrupt) in enumerate(each_pair(clean_side, corrupt_side)):
        base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        mine, at_base = recorded(model, base, heads)
        theirs, _ = recorded(model, source, heads)
        (last,), _ = recorded(model, base, blocks[-1:], output=True)
        for layer, head in itertools.product(range(LAYERS), range(HEADS)):
            dims = slice(head * 16, head * 16 + 16)
            w_o = heads[layer].weight[dims] if name == "gpt2" else heads[layer].weight[:, dims].T
            moved = last[:, -1] + (theirs[layer] - mine[layer])[:, -1, dims] @ w_o
            effect = metric(model.lm_head(norm(moved))[:, None]) - at_base
            close(found.per_prompt[number, layer, head], (effect if direction == "denoise" else -effect).detach())


@pytest.mark.parametrize("name", [*TWO, "gemma2"])
@pytest.mark.parametrize("mlps", ["frozen", "live"])
def test_path_patching_by_plain_hooks(name, mlps):
    model = make(name)
    clean_side, corrupt_side = shown(model)
    found = identify.path_patching(model, clean_side, corrupt_side, mlps=mlps)
    mean = sum(at(model, one) - at(model, other) for one, other in zip(clean_side, corrupt_side, strict=True)) / 3
    blocks = model.base_model.h if name == "gpt2" else model.base_model.layers
    frozen = [block.mlp for block in blocks] if mlps == "frozen" else []
    for number, (clean, corrupt) in enumerate(each_pair(clean_side, corrupt_side)):
        values, at_clean, _ = swept(model, clean, corrupt, frozen)
        close(found.per_prompt[number], (at_clean - values) / mean, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logit_attribution_sums_to_the_logit_difference(name):
    model = make(name)
    answers = answered(model)
    scores = identify.logit_attribution(model, CLEAN, answers)
    with bridge(model) as tl:
        weight = getattr(tl.ln_final, "weight", torch.ones(()))
        weight, bias = weight + tl.ln_final.uses_weight_offset, getattr(tl.ln_final, "bias", None)
        for number, (clean, _) in enumerate(each_pair()):
            good, bad = answers[number]
            toward = tl.W_U[:, good] - tl.W_U[:, bad]
            logits, cache = tl.run_with_cache(clean)
            rest = [cache["blocks.0.hook_resid_pre"]] + [
                cache[f"blocks.{layer}.hook_mlp_out"] for layer in range(LAYERS)
            ]
            rest = torch.stack(rest).sum(0)[0, -1]
            for block in tl.blocks:
                b_o = getattr(block.attn, "b_O", None)
                if b_o is not None:
                    assert not hasattr(block, "ln1_post")
                    rest = rest + b_o
            rest = rest if tl.ln_final.uses_rms_norm else rest - rest.mean()
            rest = rest / cache["ln_final.hook_scale"][0, -1] * weight + (0 if bias is None else bias)
            total = scores.per_prompt[number].sum() + rest @ toward + tl.b_U[good] - tl.b_U[bad]
            right, wrong = logits[0, -1, [good, bad]].tolist()
            cap = getattr(model.config, "final_logit_softcapping", None)
            if cap is not None:
                right, wrong = (cap * math.atanh(logit / cap) for logit in (right, wrong))
            assert float(total) == pytest.approx(right - wrong, rel=1e-4, abs=2e-6)
    assert scores.per_prompt.abs().max() > 1e-3


@pytest.mark.parametrize("name", TWO)
@torch.no_grad()
def test_logit_attribution_by_plain_hooks(name):
    model = make(name)
    answers = answered(model, pairs=[(7, 8), (20, 30), (RIGHT, WRONG)])
    found = identify.logit_attribution(model, CLEAN, answers)
    core = model.base_model
    blocks, norm = (core.h, core.ln_f) if name == "gpt2" else (core.layers, core.norm)
    for number, (clean, _) in enumerate(each_pair()):
        z, _ = recorded(model, clean, projections(model))
        (last,), _ = recorded(model, clean, blocks[-1:], output=True)
        last = last[0, -1]
        scale = (last.var(unbiased=False) if name == "gpt2" else last.square().mean()).add(
            norm.eps if name == "gpt2" else norm.variance_epsilon
        )
        toward = norm.weight * (model.lm_head.weight[answers[number][0]] - model.lm_head.weight[answers[number][1]])
        for layer, head in itertools.product(range(LAYERS), range(HEADS)):
            dims, w_o = slice(head * 16, head * 16 + 16), projections(model)[layer].weight
            wrote = z[layer][0, -1, dims] @ (w_o[dims] if name == "gpt2" else w_o[:, dims].T)
            wrote = wrote - wrote.mean() if name == "gpt2" else wrote
            close(found.per_prompt[number, layer, head], wrote / scale.sqrt() @ toward)


@pytest.mark.parametrize("method", [*PAIRED, identify.logit_attribution])
def test_prompts_of_several_lengths_are_as_one_by_one(method, tiny_model):
    model = tiny_model("llama")
    clean, corrupt = shown(model)

    def run(part):
        if method in PAIRED:
            return method(model, clean[part], corrupt[part], normalize=False, batch_size=2)
        return method(model, clean[part], answered(model, clean)[part], batch_size=2)

    together = run(slice(None))
    alone = HeadScores.concat([run(slice(i, i + 1)) for i in range(3)])
    close(together.per_prompt, alone.per_prompt, atol=1e-4)
    assert together.counted == 3
    assert together.name == method.__name__
    together.provenance.check_model(model)


@pytest.mark.parametrize("method", PAIRED)
def test_a_metric_of_ones_own(method, tiny_model):
    asked = []

    def probability(logits, prompts):
        asked.append(prompts)
        return log_probability(logits, prompts)

    scores = method(tiny_model("llama"), CLEAN, CORRUPT, probability, normalize=False)
    assert scores.settings["metric"] == "probability"
    assert scores.counted
    assert scores.per_prompt.nan_to_num(0.0).abs().max() > 1e-4
    assert {prompt for batch in asked for prompt in batch} == set(CLEAN)


BAD = {
    "one number": (lambda logits, prompts: logits.sum(), r"shape \[\] for \d prompts"),
    "no tensor": (lambda logits, prompts: 0.5, "float for"),
    "a matrix": (lambda logits, prompts: logits, "one number for each"),
    "nan": (lambda logits, prompts: logits[:, 0] * torch.nan, "finite"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("method", PAIRED)
def test_bad_metrics(method, case, tiny_model):
    bad, words = BAD[case]
    with pytest.raises(UsageError, match=words):
        method(tiny_model("llama"), CLEAN, CORRUPT, bad)


@pytest.mark.parametrize("method", PAIRED)
def test_bad_pairs(method, tiny_model):
    model, bare = tiny_model("llama"), Prompts.from_ids([prompt.ids for prompt in CLEAN])
    with pytest.raises(PromptError, match="pair 1 has 6 tokens clean and 7 corrupt"):
        method(model, CLEAN, prompts(2, (9, 7, 9)))
    with pytest.raises(PromptError, match="3 clean and 2 corrupt"):
        method(model, CLEAN, CORRUPT[:2])
    with pytest.raises(PromptError, match='no "right" continuations'):
        method(model, bare, CORRUPT)
    with pytest.raises(UsageError, match="unknown direction 'up'; choose from 'denoise'"):
        method(model, CLEAN, CORRUPT, direction="up")
    with pytest.raises(UsageError, match="batch_size=0"):
        method(model, CLEAN, CORRUPT, batch_size=0)
    same = Prompts.from_ids([CLEAN[0].ids], meta=[{"right": [[5, 6]], "wrong": [[5, 7]]}])
    with pytest.raises(PromptError, match="both begin with token 5"):
        method(model, same, CORRUPT[:1])
    # the corrupt prompts need no answers
    method(model, CLEAN, bare)


def test_other_bad_input(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="unknown mlps 'cold'; choose from 'frozen'"):
        identify.path_patching(model, CLEAN, CORRUPT, mlps="cold")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="no gradient"):
        identify.attribution_patching(model, CLEAN, CORRUPT, lambda logits, _: logits.argmax(-1).float())
    with pytest.raises(UsageError, match=r"shape \[2\]; give token ids"):
        identify.logit_attribution(model, CLEAN, [RIGHT, WRONG])  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="run from 0 to 127"):
        identify.logit_attribution(model, CLEAN, [(5, 9)] * 2 + [(5, 128)])
    with pytest.raises(PromptError, match='no "right" continuations'):
        identify.logit_attribution(model, Prompts.from_ids([[4, 5]]))
    with pytest.raises(ModelError, match="training mode"):
        identify.activation_patching(families.make("llama").train(), CLEAN, CORRUPT)


@pytest.mark.parametrize(("place", "words"), [("attention", "heads of layer 0"), ("lm_head", "unembedding")])
def test_logit_attribution_refuses_what_it_does_not_know(place, words):
    model = make("llama")
    modules = attention_layers(model).values() if place == "attention" else [model.lm_head]
    with hooked(modules, lambda _, x: 1.5 * x, output=True), pytest.raises(ModelError, match=words):
        identify.logit_attribution(model, CLEAN)


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(name, fails):
    model = make(name)
    before, state = model(torch.tensor([CLEAN[0].ids])).logits, {k: v.clone() for k, v in model.state_dict().items()}
    bar = patching.tqdm

    def late(logits, prompts):
        return logits[:, 0] * (torch.nan if fails and next(calls) == 3 else 1.0)

    for method in PAIRED:
        calls = itertools.count(2 if method is identify.attribution_patching else 0)
        with pytest.raises(UsageError, match="finite") if fails else contextlib.nullcontext():
            method(model, CLEAN, CORRUPT, late)
    identify.logit_attribution(model, CLEAN)
    assert patching.tqdm is bar
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(torch.tensor([CLEAN[0].ids])).logits, before)


def test_an_open_bridge_is_used_and_stays_open():
    model = make("gpt2")
    pairs, answers = shown(model), answered(model)
    expected = [f(model, *pairs) for f in PAIRED] + [identify.logit_attribution(model, CLEAN, answers)]
    with bridge(model) as tl:
        found = [f(tl, *pairs) for f in PAIRED] + [identify.logit_attribution(tl, CLEAN, answers)]
        assert tl(torch.tensor([CLEAN[0].ids])).shape == (1, 9, families.VOCAB)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours.per_prompt, theirs.per_prompt)


@pytest.mark.slow
def test_both_patchings_find_the_same_heads_of_the_demo_model(demo):
    """Measured with these pairs: rank correlation 0.99, all of the top ten shared."""
    model, tokenizer = demo
    clean, corrupt = interp.tasks.ioi(tokenizer, 4)
    exact, linear = (f(model, clean, corrupt) for f in (identify.activation_patching, identify.attribution_patching))
    agreed = exact.compare(linear, k=10)
    assert agreed.spearman > 0.8
    assert agreed.overlap >= 7
    direct, written = identify.path_patching(model, clean, corrupt), identify.logit_attribution(model, clean)
    assert direct.top(1) == written.top(1)
    assert direct.compare(written, k=10).pearson > 0.8
