"""QAdA: the estimate on truly Gaussian keys, labels against eager patterns, planted heads, invariances."""

from typing import Any

import pytest
import torch
from capture_oracle import prompts
from detectors import prompts as planted_prompts
from eager_calls import calls

from interp.analyses import tasks
from interp.analyses.identify._locality import Settings as _Settings
from interp.analyses.identify.qada import _Reader, qada
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ModelError, PromptError, UsageError
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.seam import tapping
from interp.testing import families, planted

SMALL: dict[str, Any] = {"sink": 2, "window": 6, "refresh": 8, "min_keys": 8}


def counted(n, sizes, native):
    """Of each query that counts (i, the first and one past the last key of its block's moments)."""
    for i in range(n):
        # blocks are counted from the end of a prompt
        start = max(0, n - -(-(n - i) // sizes["refresh"]) * sizes["refresh"])
        low, high = max(sizes["sink"], start - native + 1), start - sizes["window"] + 1
        if high - low >= sizes["min_keys"]:
            yield i, low, high


def parts_of(i, sizes, native):
    """Bool [k] of query i: the first and last keys, and the others that it sees."""
    j = torch.arange(i + 1)
    seen = j > i - native
    near = ((j < sizes["sink"]) | (i - j < sizes["window"])) & seen
    return near, seen & ~near


def between(found, true, unsure, least=0.95):
    """found [h] is the share of `true` [h i]; a query that is unsure may fall on either side."""
    assert (~unsure).float().mean() >= least
    low, high = (true & ~unsure).float().mean(1), (true | unsure).float().mean(1)
    torch.testing.assert_close(found, found.clamp(low, high), atol=1e-4, rtol=0)


def odds(pattern, sizes, native):
    """near - bulk [h i] of the queries that count, by an eager pattern; a learned sink takes the same from both."""
    found = []
    for i, _, _ in counted(pattern.shape[-1], sizes, native):
        near, far = parts_of(i, sizes, native)
        row = pattern[:, i, : i + 1].double()
        found.append((row[:, near].sum(1) / row[:, far].sum(1)).log())
    return torch.stack(found, 1)


def windows_of(model, name):
    """Of each layer of a tiny model."""
    windowed = name in ("mistral", "gemma2", "gemma3", "gpt_oss")
    return [32 if windowed and (name == "mistral" or layer == 0) else 10**6 for layer in range(2)]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_oracle_equals_eager(tiny_model, eager, name):
    model, batch, taus = tiny_model(name), prompts((70, 90)), (0.3, 0.8)
    scores = qada(model, batch, **SMALL, tau=0.8, taus=taus)
    for row, prompt in enumerate(batch):
        for layer, (p, native) in enumerate(zip(eager(model, prompt), windows_of(model, name), strict=True)):
            gap = odds(p, SMALL, native)
            assert gap.shape[1] > 30
            for t, tau in enumerate(taus):
                edge = torch.tensor(tau).double().logit()
                unsure = (gap - edge).abs() < 1e-4
                between(scores.extras["oracle_sparsity"][row, layer, :, t], gap >= edge, unsure)
                if tau == 0.8:
                    between(scores.extras["oracle"][row, layer], gap < edge, unsure)


def estimated(q, k, scale, sizes, native):
    """near - estimate, |estimate - bulk|, v and log T, [h i] each, of one layer by the formula, query by query."""
    found = []
    q, k = q.double(), k.double()
    for i, low, high in counted(q.shape[1], sizes, native):
        near, far = parts_of(i, sizes, native)
        mean = k[:, low:high].mean(1)
        covariance = torch.stack([torch.cov(x.T, correction=0) for x in k[:, low:high]])
        logit = scale * torch.einsum("hd,hkd->hk", q[:, i], k[:, : i + 1])
        m = scale * (q[:, i] * mean).sum(-1)
        v = scale**2 * torch.einsum("hd,hde,he->h", q[:, i], covariance, q[:, i])
        size = far.sum().double().log().expand(len(v))
        estimate = torch.where(v > 2 * size, m + (2 * size * v).sqrt(), size + m + v / 2)
        error = (estimate - torch.logsumexp(logit[:, far], 1)).abs()
        found.append((torch.logsumexp(logit[:, near], 1) - estimate, error, v, size))
    return tuple(torch.stack(part, 1) for part in zip(*found, strict=True))


def check_against_eager(model, batch, windows, sizes, *, tau, broken):
    """The scores and all extras of every head against the formula on the q, k and pattern of eager attention."""
    scores = qada(model, batch, **sizes, tau=tau, taus=(tau,), broken=broken)
    edge = torch.tensor(tau).double().logit()
    for row, prompt in enumerate(batch):
        eager = calls(model, prompt)
        extras = {name: value[row] for name, value in scores.extras.items()}
        for layer, native in enumerate(windows):
            gap, error, v, size = estimated(eager.q[layer], eager.k[layer], eager.scale, sizes, native)
            truth = odds(eager.pattern[layer], sizes, native)
            gone, unsure_gone = v > size, (v - size).abs() < 1e-4
            told, far = gap < edge, truth < edge
            unsure_told, unsure_far = (gap - edge).abs() < 1e-4, (truth - edge).abs() < 1e-4
            if broken == "long":
                told, unsure_told = told | gone, unsure_told | unsure_gone
            between(extras["sparsity"][layer, :, 0], ~told, unsure_told)
            between(extras["oracle_sparsity"][layer, :, 0], ~far, unsure_far)
            between(scores.per_prompt[row, layer], told, unsure_told)
            between(extras["oracle"][layer], far, unsure_far)
            between(extras["agreement"][layer], told == far, unsure_told | unsure_far)
            between(extras["missed"][layer], far & ~told, unsure_told | unsure_far)
            between(extras["broken"][layer], gone, unsure_gone)
            known = ~unsure_gone.any(1)
            expected = error.masked_fill(gone, torch.nan).nanmean(1).float()
            torch.testing.assert_close(
                extras["log_error"][layer][known], expected[known], atol=1e-4, rtol=1e-5, equal_nan=True
            )


@pytest.mark.parametrize("broken", ["clamp", "long"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_labels_equal_the_formula(tiny_model, name, broken):
    model = tiny_model(name)
    check_against_eager(model, prompts((60,)), windows_of(model, name), SMALL, tau=0.7, broken=broken)


def test_labels_equal_the_formula_on_the_demo_model(demo):
    model, tokenizer = demo
    batch = tasks.passages(tokenizer, n=1, length=100, seed=1)
    sizes: dict[str, Any] = {"sink": 4, "window": 16, "refresh": 16, "min_keys": 32}
    check_against_eager(model, batch, [10**6] * 30, sizes, tau=0.9, broken="clamp")


def test_sparsity_falls_with_tau_and_extras_agree(tiny_model):
    scores = qada(tiny_model("llama"), prompts((90, 110)), **SMALL, taus=(0.2, 0.5, 0.8, 0.9, 0.99))
    for name in ("sparsity", "oracle_sparsity"):
        steps = scores.extras[name].diff(dim=-1)
        assert (steps <= 0).all()
        assert (steps < 0).any()
    torch.testing.assert_close(scores.per_prompt, 1 - scores.extras["sparsity"][..., 3])
    # labels differ where a long query is missed, or a local one is called long
    differs = 1 - scores.extras["agreement"]
    called = scores.per_prompt - scores.extras["oracle"] + scores.extras["missed"]
    torch.testing.assert_close(differs, called + scores.extras["missed"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_batch_is_one_by_one_padded_or_not(tiny_model, name):
    model, batch = tiny_model(name), prompts((40, 66, 51))
    together = qada(model, batch, **SMALL, batch_size=3)
    alone = HeadScores.concat([qada(model, batch[i : i + 1], **SMALL) for i in range(3)])
    # a query at the very threshold may fall on either side
    torch.testing.assert_close(together.per_prompt, alone.per_prompt, atol=1 / 25, rtol=0)
    assert (together.per_prompt - alone.per_prompt).abs().mean() < 1e-3
    for name in ("log_error", "oracle", "broken"):
        torch.testing.assert_close(together.extras[name], alone.extras[name], atol=1 / 25, rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("kind", ["sink", "previous_token"])
def test_planted_local_heads_need_no_bulk(family, kind):
    """The planted head is the one that is local, and no longer where its query weights are shuffled."""
    for seed in range(5):
        for shuffled in (False, True):
            truth = planted.make(kind, seed, family, shuffled=shuffled)
            # one long prompt with one BOS
            rows = planted.prompts(kind, seed).ids
            ids = [[*rows[i], *rows[i + 1][1:]][:60] for i in (0, 2)]
            scores = qada(truth.model, Prompts.from_ids(ids), sink=1, window=4, refresh=4, min_keys=8, tau=0.7)
            # logits of a planted head are far from Gaussian, so its labels are not all right
            for table, low in ((scores.values, 0.3), (scores.extras["oracle"].mean(0), 0.1)):
                if shuffled:
                    assert table[truth.head] > 0.5, (seed, table)
                else:
                    assert table[truth.head] < low, (seed, table)
                    rest = table.clone()
                    rest[truth.head] = 1
                    assert rest.min() > 0.4, (seed, table)


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_planted_induction_head_is_long_where_there_is_something_to_look_up(family):
    for seed in range(3):
        truth = planted.make("induction", seed, family)
        found = [
            qada(
                truth.model,
                planted_prompts("induction", seed, shuffled=s),
                sink=1,
                window=4,
                refresh=4,
                min_keys=8,
                tau=0.7,
            )
            for s in (False, True)
        ]
        plain, control = (scores.extras["oracle"].mean(0)[truth.head] for scores in found)
        assert plain > 0.5, seed
        assert control < 0.15, seed


def test_nothing_changes_in_the_model(tiny_model):
    model, batch = tiny_model("llama"), prompts((60,))
    with torch.no_grad():
        before = model(**batch.tensors()).logits
        qada(model, batch, **SMALL)
        assert torch.equal(model(**batch.tensors()).logits, before)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_with_a_narrow_window_has_no_bulk(tiny_model):
    scores = qada(tiny_model("gemma3"), prompts((90,)), sink=2, window=40, refresh=8, min_keys=8)
    assert (scores.per_prompt[0, 0] == 0).all()
    assert (scores.extras["sparsity"][0, 0] == 1).all()
    assert not scores.per_prompt[0, 1].isnan().any()


def test_what_it_refuses(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(PromptError, match="prompt 1 has 20 tokens, and 23 are needed before a query has 8 keys"):
        qada(model, prompts((30, 20)), **SMALL)
    with pytest.raises(UsageError, match="are not all shares of attention; give numbers between 0 and 1"):
        qada(model, prompts((30,)), **SMALL, tau=1.0)
    with pytest.raises(UsageError, match="refresh=0, min_keys=8 are out of range; give a sink of at least 0"):
        qada(model, prompts((30,)), refresh=0, min_keys=8)
    with pytest.raises(UsageError, match="unknown broken 'guess'; choose from 'clamp', 'long'"):
        qada(model, prompts((30,)), **SMALL, broken="guess")  # pyright: ignore[reportArgumentType]
    reader = _Reader(_Settings(0.9, 2, 6, 8, 8, (), "clamp"))
    packed = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    with tapping(model, reader), pytest.raises(ModelError, match="layer 0 has a mask that is not causal"):
        model(prompts((30,)).tensors()["input_ids"], attention_mask=packed)
