"""Copying and long-range heads against their definitions on eager attention, four copies, groups, and errors."""

import math
from dataclasses import replace

import planted
import pytest
import torch
from capture_oracle import content, greedy
from families import VOCAB

from interp.analyses import identify, tasks
from interp.analyses.identify.qrhead import _ndcg as ndcg
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, ScoreError, SpanError, UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts

FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gpt_oss")


def tokens(n, seed=0):
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_content(model, prompt):
    """softmax of q . k before rotation [l h q k], over earlier keys; tiny and demo heads scale by 1 / sqrt(d)."""
    q, k = content(model, prompt)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


def assert_razor_is_the_mean_over_rows_and_copies(model, patterns, prompts, n, copies, **settings):
    for score, after in ((identify.razor_induction, 1), (identify.razor_echo, 0)):
        found = score(model, prompts, **settings).per_prompt
        for i, prompt in enumerate(prompts):
            p = patterns(model, prompt)
            pairs = [(1 + c * n + j, d) for c in range(1, copies) for j in range(n) for d in range(1, c + 1)]
            assert len(pairs) == n * copies * (copies - 1) // 2
            expected = torch.stack([p[:, :, q, q - d * n + after] for q, d in pairs]).mean(0)
            torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_razor_is_the_mean_over_rows_and_copies(tiny_model, eager, name):
    prompts = tasks.repeated(VOCAB, n=9, copies=4, batch=2, bos=1)
    assert_razor_is_the_mean_over_rows_and_copies(tiny_model(name), eager, prompts, 9, 4)


def test_razor_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    prompts = tasks.repeated(tokenizer, n=20, copies=4, batch=2, seed=2)
    assert_razor_is_the_mean_over_rows_and_copies(model, eager, prompts, 20, 4)
    assert_razor_is_the_mean_over_rows_and_copies(model, by_content, prompts, 20, 4, rope=False)


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_four_copies_bound_razor_by_a_half(family):
    for seed in range(4):
        for kind, score in (("induction", identify.razor_induction), ("echo", identify.razor_echo)):
            made = planted.make(kind, seed, family)
            prompts = tasks.repeated(planted.VOCAB - 3, n=20, copies=4, batch=3, bos=planted.BOS, seed=seed)
            scores = score(made.model, prompts)
            assert scores.top(1) == [made.head]
            assert 0.4 < scores[made.head] <= 0.5
            assert float(scores.per_prompt.max()) <= 0.5
            control = score(made.model, tasks.repeated(60, n=14, copies=4, batch=3, bos=1, seed=seed, shuffled=True))
            assert control[made.head] < 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_razor_without_rope_is_softmax_of_content(tiny_model, name):
    model = tiny_model(name)
    prompts = tasks.repeated(VOCAB, n=7, copies=3, batch=1, bos=1)
    assert_razor_is_the_mean_over_rows_and_copies(model, by_content, prompts, 7, 3, rope=False)
    found = identify.razor_echo(model, prompts, rope=False)
    assert found.settings == {"rope": False}
    assert (found.per_prompt - identify.razor_echo(model, prompts).per_prompt).abs().max() > 1e-3


def table(values, name="razor", kv_heads=2):
    return HeadScores(name, torch.tensor(values)[None], kv_heads=kv_heads)


def test_protected_heads_are_whole_groups():
    induction = table([[0.1, 0.4, 0.0, 0.0], [0.3, 0.0, 0.2, 0.0]])
    echo = table([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.3]])
    assert str(identify.razor_protected(induction, echo)) == "L0H0, L0H1, L1H2, L1H3"
    # half of four kv heads by induction; a share of nothing still protects one
    both = identify.razor_protected(induction, echo, share=(0.5, 0.0))
    assert str(both) == "L0H0, L0H1, L1H0, L1H1, L1H2, L1H3"
    # equal scores never take more than the share
    flat = table([[0.2] * 4] * 2)
    assert str(identify.razor_protected(flat, flat)) == "L0H0, L0H1"
    own = identify.razor_protected(induction, echo, HeadLayout(2, 4, 4))
    assert str(own) == "L0H1, L1H3"


def test_errors_of_razor(tiny_model):
    with pytest.raises(PromptError, match="'razor_echo' has no query with a target"):
        identify.razor_echo(tiny_model("llama"), Prompts.from_ids([tokens(12)]))
    one, other = table([[0.1, 0.2]]), table([[0.1, 0.2], [0.3, 0.4]])
    with pytest.raises(ScoreError, match="2x2 heads and the layout 1x2; give both scores of one model"):
        identify.razor_protected(one, other)
    with pytest.raises(UsageError, match=r"share=\(2, 0\.1\) is out of range; give the shares"):
        identify.razor_protected(one, one, share=(2, 0.1))


def answered(length=40, n=2):
    """Prompts of random tokens whose answer is most of them, and a distractor, for models that write nonsense."""
    spans = [
        {"answer": (4, 24), "needle": (2, 30), "distractor": [(30, 33), (35, 38)]},
        {"answer": (1, 21), "needle": (1, 21)},
    ]
    return Prompts.from_ids([tokens(length - 3 * i, 7 + i) for i in range(n)], spans=spans[:n])


def assert_semantic_and_reasoning_equal_the_steps(model, eager, prompts, settings, tokenizer=None):
    """Where token t of the reply is made: attention on a span, and on its keys among the K of the largest."""
    semantic_retrieval = {
        span: identify.semantic_retrieval(model, prompts, span=span, **settings) for span in ("answer", "needle")
    }
    retrieval_reasoning = identify.retrieval_reasoning(model, prompts, **settings)
    for i, prompt in enumerate(prompts):
        ids = greedy(model, prompt, settings["max_new_tokens"], tokenizer)
        assert ids
        p = eager(model, Prompts.from_ids([[*prompt.ids, *ids]])[0])[:, :, len(prompt) - 1 :]
        for span, found in semantic_retrieval.items():
            (start, stop), total = prompt.spans[span][0], torch.zeros(p.shape[:2])
            for t, token in enumerate(ids):
                total += prompt.ids[start:stop].count(token) * p[:, :, t, start:stop].sum(-1)
            torch.testing.assert_close(found.per_prompt[i], total, atol=1e-4, rtol=0)
        (start, stop), total, other = prompt.spans["answer"][0], torch.zeros(p.shape[:2]), torch.zeros(p.shape[:2])
        distractors = prompt.spans.get("distractor", ())
        for t in range(min(len(ids), stop - start)):
            row = p[:, :, t]
            best = row >= row.topk(min(stop - start, 64), -1).values[..., -1:]
            total += (row * best)[..., start:stop].sum(-1) / (stop - start)
            size = sum(b - a for a, b in distractors)
            other += sum((row * best)[..., a:b].sum(-1) / size for a, b in distractors)
        torch.testing.assert_close(retrieval_reasoning.per_prompt[i], total, atol=1e-4, rtol=0)
        if distractors:
            torch.testing.assert_close(retrieval_reasoning.extras["distractor"][i], other, atol=1e-4, rtol=0)
        else:
            assert retrieval_reasoning.extras["distractor"][i].isnan().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_decode_steps_equal_eager(tiny_model, eager, name):
    settings = {"recall": -1.0, "max_new_tokens": 24}
    assert_semantic_and_reasoning_equal_the_steps(tiny_model(name), eager, answered(), settings)


def test_a_long_span_takes_64_keys(tiny_model, eager):
    spans = [{"answer": (2, 110), "needle": (2, 110)}]
    prompts, settings = Prompts.from_ids([tokens(120)], spans=spans), {"recall": -1.0, "max_new_tokens": 3}
    assert_semantic_and_reasoning_equal_the_steps(tiny_model("llama"), eager, prompts, settings)


@pytest.mark.parametrize(
    ("kind", "n", "written"), [("inferred", 1, 6), pytest.param("literal", 2, 16, marks=pytest.mark.slow)]
)
def test_scores_of_decode_steps_equal_eager_on_the_demo_model(demo, eager, kind, n, written):
    model, tokenizer = demo
    prompts = tasks.needle(tokenizer, lengths=(140,), n=n, needles=3, kind=kind, seed=5)
    settings = {"recall": -1.0, "max_new_tokens": written}
    assert_semantic_and_reasoning_equal_the_steps(model, eager, prompts, settings, tokenizer)


def test_replies_that_are_wrong_do_not_count(tiny_model):
    model, prompts = tiny_model("llama"), answered()
    for method in (identify.semantic_retrieval, identify.retrieval_reasoning):
        scores = method(model, prompts, recall=1.0, max_new_tokens=4)
        assert scores.counted == 0
        assert all(extra.isnan().all() for extra in scores.extras.values())


@pytest.mark.parametrize("method", [identify.semantic_retrieval, identify.retrieval_reasoning])
def test_errors_of_decode_scores(tiny_model, method):
    model, ids = tiny_model("llama"), [tokens(20)]
    with pytest.raises(SpanError, match='prompt 0 has no span "answer"'):
        method(model, Prompts.from_ids(ids))
    with pytest.raises(SpanError, match="prompt 0 has its answer in 2 places"):
        method(model, Prompts.from_ids(ids, spans=[{"answer": [(1, 2), (5, 6)]}]))
    with pytest.raises(SpanError, match='prompt 0 has no span "clue"'):
        method(model, Prompts.from_ids(ids, spans=[{"answer": (1, 2)}]), span="clue")


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


def quiz(n=3):
    spans = [{"options": [(3 * d + 1, 3 * d + 4) for d in range(4 + i % 2)]} for i in range(n)]
    return Prompts.from_ids([tokens(24 + i, i) for i in range(n)], spans=spans, meta=[{"option": i} for i in range(n)])


def assert_qk_score_equals_queries_and_keys(model, eager, prompts):
    by_fit, by_pattern = identify.qk_score(model, prompts), identify.qk_score(model, prompts, attention=True)
    assert (by_fit.name, by_pattern.name) == ("qk_score", "qk_score_attention")
    for i, prompt in enumerate(prompts):
        q, k = content(model, prompt)
        ends = [stop - 1 for _, stop in prompt.spans["options"]]
        fit = torch.einsum("lhd,lhkd->lhk", q[:, :, -1], k[:, :, ends]) / math.sqrt(q.shape[-1])
        for scores, wanted in ((by_fit, fit), (by_pattern, eager(model, prompt)[:, :, -1, ends])):
            torch.testing.assert_close(scores.extras["options"][i, ..., : len(ends)], wanted, atol=1e-4, rtol=0)
            assert torch.equal(scores.per_prompt[i], (wanted.argmax(-1) == prompt.meta["option"]).float())


@pytest.mark.parametrize("name", FAMILIES)
def test_qk_score_equals_queries_and_keys(tiny_model, eager, name):
    assert_qk_score_equals_queries_and_keys(tiny_model(name), eager, quiz())


def test_qk_score_equals_queries_and_keys_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    assert_qk_score_equals_queries_and_keys(model, eager, tasks.get("choice").prompts(tokenizer, n=2))


def test_a_head_that_sees_no_option_points_at_none(tiny_model):
    model = tiny_model("gemma2")
    spans = [{"options": [(1, 3), (3, 5)]}]
    for option in range(2):
        prompts = Prompts.from_ids([tokens(80)], spans=spans, meta=[{"option": option}])
        for attention in (False, True):
            scores = identify.qk_score(model, prompts, attention=attention)
            # layer 0 sees the last 32 tokens only
            assert (scores.per_prompt[0, 0] == 0).all()


def test_errors_of_qk_score(tiny_model):
    model, ids = tiny_model("llama"), [tokens(20)]
    with pytest.raises(SpanError, match='prompt 0 has no span "options"'):
        identify.qk_score(model, Prompts.from_ids(ids))
    with pytest.raises(SpanError, match='"options" of prompt 0 has one range'):
        identify.qk_score(model, Prompts.from_ids(ids, spans=[{"options": (1, 3)}], meta=[{"option": 0}]))
    two = [{"options": [(1, 3), (3, 5)]}]
    for meta, said in (({}, "None"), ({"option": 2}, "2")):
        with pytest.raises(PromptError, match=f'"option" of prompt 0 is {said}; give the number, from 0'):
            identify.qk_score(model, Prompts.from_ids(ids, spans=two, meta=[meta]))
