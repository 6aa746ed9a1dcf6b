"""QAdA: the estimate on truly Gaussian keys, labels against eager patterns, planted heads, invariances."""

from typing import Any

import families
import planted
import pytest
import torch
from detectors import prompts as planted_prompts
from reading import eager_patterns, prompts

from interp.analyses.identify.qada import _Reader, _Settings, qada
from interp.analyses.scores import HeadScores
from interp.hooks import keep
from interp.hooks.capture import capture, run
from interp.hooks.prompts import Prompts
from interp.hooks.seam import tapping
from interp.kernels.errors import ModelError, PromptError, UsageError

SMALL: dict[str, Any] = {"sink": 2, "window": 6, "refresh": 8, "least": 8}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_oracle_equals_eager(tiny_model, name):
    model, batch = tiny_model(name), prompts((70, 90))
    scores = qada(model, batch, **SMALL, tau=0.8, taus=(0.3, 0.8))
    patterns = eager_patterns(model, batch)
    for row, n in enumerate(batch.lengths):
        p = patterns[row, :, :, -n:, -n:]
        i, j = torch.arange(n)[:, None], torch.arange(n)
        near = (j < 2) | (i - j < 6)
        # over keys alone, whatever a learned sink takes
        mass = (p * near).sum(-1) / p.sum(-1)
        starts = n - 8 * torch.arange(20)
        block = torch.tensor([max(int(s) for s in starts if s <= q) for q in range(n)])
        windowed = name in ("mistral", "gemma2", "gemma3", "gpt_oss")
        for layer in range(2):
            window = 32 if windowed and (name == "mistral" or layer == 0) else 10**6
            known = block - 6 + 1 - torch.maximum(torch.tensor(2), block - window + 1)
            counts = known >= 8
            assert counts.sum() > 30
            for t, tau in enumerate((0.3, 0.8)):
                local = (mass[layer] >= tau)[:, counts].float().mean(1)
                torch.testing.assert_close(
                    scores.extras["oracle_sparsity"][row, layer, :, t], local, atol=1e-4 + 1 / 60, rtol=0
                )
            torch.testing.assert_close(
                scores.extras["oracle"][row, layer], 1 - scores.extras["oracle_sparsity"][row, layer, :, 1]
            )


@pytest.mark.parametrize("broken", ["clamp", "long"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_labels_equal_the_formula_on_captured_keys(tiny_model, name, broken):
    """One prompt, from q and k as they were captured, moments by numpy's definition."""
    model, batch = tiny_model(name), prompts((60,))
    scores = qada(model, batch, **SMALL, tau=0.7, broken=broken)
    with capture(model, [keep.q(), keep.k()], batch) as cap:
        run(model, batch)
    scale = model.config.query_pre_attn_scalar**-0.5 if name == "gemma3" else 0.25
    n, starts = 60, [0, *range(4, 60, 8)]
    for layer in range(2):
        window = 32 if name == "gemma3" and layer == 0 else 10**6
        q = cap[keep.q()][0, layer].double()
        k = cap[keep.k()][0, layer].double()
        k = k.repeat_interleave(len(q) // len(k), 0)
        long, errors, breaks = [], [], []
        for start, stop in zip(starts, [*starts[1:], n], strict=True):
            low, high = max(2, start - window + 1), start - 6 + 1
            if high - low < 8:
                continue
            part = k[:, low:high]
            mean = part.mean(1)
            covariance = torch.stack([torch.cov(x.T, correction=0) for x in part])
            for i in range(start, stop):
                logit = scale * torch.einsum("hd,hkd->hk", q[:, i], k[:, : i + 1])
                j = torch.arange(i + 1)
                seen = j > i - window
                near = ((j < 2) | (i - j < 6)) & seen
                far = ~near & seen
                m = scale * (q[:, i] * mean).sum(-1)
                v = scale**2 * torch.einsum("hd,hde,he->h", q[:, i], covariance, q[:, i])
                count = far.sum().double()
                gone = v > count.log()
                estimate = count.log() + m + v / 2
                frozen = v > 2 * count.log()
                estimate[frozen] = (m + (2 * count.log() * v).sqrt())[frozen]
                bulk = torch.logsumexp(logit[:, far], 1)
                told = torch.logsumexp(logit[:, near], 1) - estimate < torch.tensor(0.7).double().logit()
                long.append(told | gone if broken == "long" else told)
                errors.append((estimate - bulk).abs().masked_fill(gone, torch.nan))
                breaks.append(gone)
        torch.testing.assert_close(
            scores.per_prompt[0, layer], torch.stack(long).double().mean(0).float(), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            scores.extras["log_error"][0, layer],
            torch.stack(errors).nanmean(0).float(),
            atol=1e-3,
            rtol=1e-3,
            equal_nan=True,
        )
        torch.testing.assert_close(
            scores.extras["broken"][0, layer], torch.stack(breaks).double().mean(0).float(), atol=1e-4, rtol=0
        )


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
            scores = qada(truth.model, Prompts.from_ids(ids), sink=1, window=4, refresh=4, least=8, tau=0.7)
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
                least=8,
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
    scores = qada(tiny_model("gemma3"), prompts((90,)), sink=2, window=40, refresh=8, least=8)
    assert (scores.per_prompt[0, 0] == 0).all()
    assert (scores.extras["sparsity"][0, 0] == 1).all()
    assert not scores.per_prompt[0, 1].isnan().any()


def test_what_it_refuses(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(PromptError, match="prompt 1 has 20 tokens; 23 are needed before a query has 8 keys"):
        qada(model, prompts((30, 20)), **SMALL)
    with pytest.raises(UsageError, match="a share of attention lies between 0 and 1"):
        qada(model, prompts((30,)), **SMALL, tau=1.0)
    with pytest.raises(UsageError, match="refresh=0, least=8: give at least 1"):
        qada(model, prompts((30,)), refresh=0, least=8)
    with pytest.raises(UsageError, match="broken='guess': say 'clamp' or 'long'"):
        qada(model, prompts((30,)), **SMALL, broken="guess")  # pyright: ignore[reportArgumentType]
    reader = _Reader(_Settings(0.9, 2, 6, 8, 8, (), "clamp"))
    packed = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    with tapping(model, reader), pytest.raises(ModelError, match="layer 0 has a mask of its own"):
        model(prompts((30,)).tensors()["input_ids"], attention_mask=packed)
