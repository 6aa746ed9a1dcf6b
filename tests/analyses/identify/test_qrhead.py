"""QRHead against its definition on eager attention, ranks, and errors."""

import math
from dataclasses import replace

import pytest
import torch

from interp.analyses import identify, tasks
from interp.analyses.identify.qrhead import _ndcg as ndcg
from interp.errors import PromptError, SpanError, UsageError
from interp.hooks.prompts.prompts import Prompts
from interp.testing.families import VOCAB

FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gpt_oss")


def tokens(n, seed=0):
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def paired(n=2):
    """Pairs with documents of several lengths, one of a single token, and queries of two lengths."""
    spans = {"documents": [(1, 12), (13, 14), (14, 30)], "gold": (13, 14), "query": (31, 36)}
    ids = [tokens(36 + i, i) for i in range(n)]
    more = [spans | {"query": (31, 36 + i), "gold": [(1, 12), (14, 30)] if i else (1, 12)} for i in range(n)]
    null = [[*row[:31], 5, 6] for row in ids]
    return Prompts.from_ids(ids, spans=more), Prompts.from_ids(null, spans=[spans | {"query": (31, 33)}] * n)


def literal_documents(patterns, prompt, other):
    """What each document receives by the formula, least and most [l h s]: a token on the threshold may count or not."""
    rows = [p[:, :, slice(*one.spans["query"][0])] for p, one in zip(patterns, (prompt, other), strict=True)]
    end = prompt.spans["documents"][-1][1]
    c = rows[0].mean(2)[..., :end] - rows[1].mean(2)[..., :end]
    least, most = [], []
    for start, stop in prompt.spans["documents"]:
        part = c[..., start:stop]
        over = torch.zeros_like(part) - 1
        if stop - start > 1:
            over = part - part.mean(-1, keepdim=True) + 2 * part.std(-1, keepdim=True)
        edge = over.abs() < 1e-6
        sure = torch.where((over > 0) & ~edge, part, 0).sum(-1)
        least.append(sure + torch.where(edge, part.clamp(max=0), 0).sum(-1))
        most.append(sure + torch.where(edge, part.clamp(min=0), 0).sum(-1))
    return torch.stack(least, -1), torch.stack(most, -1)


def check_qrhead_against_eager(eager, model, prompts, null):
    """Documents, scores and ranks of every head against the formulas on eager patterns."""
    scores, ranked = (identify.qrhead(model, prompts, null, metric=metric) for metric in ("score", "ndcg"))
    assert ranked.name == "qrhead_ndcg"
    for i, (prompt, other) in enumerate(zip(prompts, null, strict=True)):
        least, most = literal_documents([eager(model, one) for one in (prompt, other)], prompt, other)
        assert (most - least < 1e-4).float().mean() > 0.9
        found = scores.extras["documents"][i][..., : least.shape[-1]]
        torch.testing.assert_close(found, found.clamp(least, most), atol=1e-4, rtol=0)
        gold = [prompt.spans["documents"].index(place) for place in prompt.spans["gold"]]
        total = scores.per_prompt[i]
        bounds = (bound[..., gold].sum(-1) for bound in (least, most))
        torch.testing.assert_close(total, total.clamp(*bounds), atol=1e-4, rtol=0)
        # of heads whose documents are clearly apart, as of fewer than ten
        order = found.argsort(-1, descending=True)
        apart = (found.gather(-1, order).diff(dim=-1) < -1e-4).all(-1)
        gain = torch.tensor([1 / math.log2(rank + 2) for rank in range(found.shape[-1])])
        expected = sum((order == place).float() @ gain for place in gold) / gain[: len(gold)].sum()
        torch.testing.assert_close(ranked.per_prompt[i][apart], expected[apart], atol=1e-4, rtol=0)
        assert apart.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_qrhead_equals_eager(tiny_model, eager, name):
    check_qrhead_against_eager(eager, tiny_model(name), *paired())


def test_qrhead_equals_eager_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    check_qrhead_against_eager(eager, model, *tasks.documents(tokenizer, n=1, count=2, seed=1))


def test_ndcg_counts_ranks():
    doc = torch.tensor([[[3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [2.0, 3.0, 1.0]]])
    torch.testing.assert_close(ndcg(doc, [0]), torch.tensor([[1.0, 1 / 2, 1 / math.log2(3)]]))
    torch.testing.assert_close(ndcg(doc, [0, 2])[0, 0], torch.tensor(1.0))
    # the eleventh document is not looked at
    assert ndcg(torch.arange(12.0, 0, -1)[None, None], [10]) == 0


def test_errors_of_qrhead(tiny_model):
    model, (prompts, null) = tiny_model("llama"), paired()
    with pytest.raises(UsageError, match="unknown metric 'recall'; choose from 'score', 'ndcg'"):
        identify.qrhead(model, prompts, null, metric="recall")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PromptError, match="2 prompts and 1 null prompts"):
        identify.qrhead(model, prompts, null[:1])
    with pytest.raises(PromptError, match="prompt 0 and its null partner differ before the end of the documents"):
        identify.qrhead(model, prompts, null[::-1])
    with pytest.raises(SpanError, match='prompt 0 has no span "gold"'):
        identify.qrhead(model, null_of(prompts, "gold"), null)
    partly = replace(prompts[0], spans={**prompts[0].spans, "gold": ((1, 5),)})
    with pytest.raises(PromptError, match='"gold" of prompt 0 is not one of its documents'):
        identify.qrhead(model, replace(prompts, items=(partly,)), null[:1])


def null_of(prompts, name):
    items = [replace(p, spans={key: where for key, where in p.spans.items() if key != name}) for p in prompts]
    return replace(prompts, items=tuple(items))
