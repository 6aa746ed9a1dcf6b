"""Layers with a window: detectors against eager attention, where a head sees its target from some queries or none."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf

from interp.analyses import identify
from interp.hooks.prompts.prompts import Prompts
from interp.report.words import summary
from interp.testing import families

WINDOW, TOKENS = 16, 64


@pytest.fixture(scope="module")
def windowed():
    """Gemma 2 of two layers, the first with a window of 16, the second with none."""
    config = tf.Gemma2Config(
        **families.GROUPED, **families.HEAD, num_hidden_layers=2, sliding_window=WINDOW, query_pre_attn_scalar=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config)
        for parameter, weight in model.named_parameters():
            families._spread(parameter, weight.data)
    return model.eval()


def tokens(n, seed=0):
    return torch.randint(3, families.VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def copies(number, seed=0):
    """Copies of one text, together 64 tokens."""
    n = TOKENS // number
    names = ("first", "second", "copy3", "copy4")[:number]
    spans = {name: (i * n, (i + 1) * n) for i, name in enumerate(names)}
    return Prompts.from_ids([tokens(n, seed) * number, tokens(n, seed + 1) * number], spans=[spans] * 2)


def pairs(p, distances, first):
    """Mean over all pairs of a query from `first` on and a key at one of the distances before it."""
    rows = torch.arange(first, TOKENS)
    return torch.stack([p[:, :, rows, rows - d] for d in distances]).mean(0).mean(-1)


@dataclass(frozen=True)
class Case:
    """A detector on prompts of 64 tokens, and its formula on the eager pattern [l h q k] of a prompt."""

    name: str
    run: Callable[..., Any]
    prompts: Prompts
    formula: Callable[[torch.Tensor], Any]
    hidden: bool = True
    """whether the window of 16 hides every target"""


FOUR = range(TOKENS // 4, TOKENS)
CASES = [
    Case("sinks", identify.sinks, copies(1), lambda p: p[..., 0].sum(-1) / TOKENS, hidden=False),
    Case("induction", identify.induction, copies(2), lambda p: pairs(p, [31], 32)),
    Case("induction within", identify.induction, copies(4), lambda p: pairs(p, [15], 16), hidden=False),
    Case("duplicate_token", identify.duplicate_token, copies(2), lambda p: pairs(p, [32], 32)),
    Case("previous_token", identify.previous_token, copies(1), lambda p: pairs(p, [1], 1), hidden=False),
    Case("razor_echo", identify.razor_echo, copies(2), lambda p: pairs(p, [32], 32)),
    # every pair of a query and an earlier copy counts, and the window hides those of two copies and more
    Case(
        "razor_induction",
        identify.razor_induction,
        copies(4),
        lambda p: sum(p[:, :, q, q - 16 * d + 1] for q in FOUR for d in range(1, q // 16 + 1)) / (16 * 6),
        hidden=False,
    ),
    Case(
        "concept_induction",
        partial(identify.concept_induction, by_value=False, right_only=False),
        Prompts.from_ids([tokens(TOKENS), tokens(TOKENS, 1)], spans=[{"entity": (9, 13)}] * 2),
        lambda p: p[:, :, -1, 12],
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_window_of_16_with_64_tokens(windowed, eager, case):
    """The formula over all queries where any target is seen; no score where none is."""
    scores = case.run(windowed, case.prompts)
    for i, prompt in enumerate(case.prompts):
        expected = case.formula(eager(windowed, prompt))
        if case.hidden:
            assert (expected[0] == 0).all()
            expected[0] = torch.nan
        torch.testing.assert_close(scores.per_prompt[i], expected, atol=1e-5, rtol=0, equal_nan=True)
    # heads without a score leave the count, and none of them is in a list
    assert scores.n_scored == (4 if case.hidden else 8)
    assert summary(scores, 0.3).heads == scores.n_scored
    assert len(scores.top(8)) == scores.n_scored
    for extra in scores.extras.values():
        if extra.shape == scores.per_prompt.shape:
            assert extra[:, 0].isnan().all() == case.hidden


def test_razor_protects_no_head_that_sees_no_copy(windowed):
    prompts = copies(2)
    both = identify.razor_induction(windowed, prompts), identify.razor_echo(windowed, prompts)
    protected = identify.razor_protected(*both, share=(1.0, 1.0))
    assert {head.layer for head in protected} == {1}
    assert len(protected) == 4


def test_sinks_among_the_queries_that_see_the_first_token(windowed, eager):
    prompts = Prompts.from_ids([tokens(TOKENS), tokens(50, 1)])
    shares = {rows: identify.sinks(windowed, prompts, rows=rows) for rows in ("all", "visible")}
    assert [each.name for each in shares.values()] == ["sinks", "sinks_visible"]
    for i, prompt in enumerate(prompts):
        p, n = eager(windowed, prompt), len(prompt)
        each = p.sum(-2) / torch.arange(n, 0, -1)
        torch.testing.assert_close(shares["all"].extras["positions"][i], each[..., :32], atol=1e-5, rtol=0)
        torch.testing.assert_close(shares["all"].per_prompt[i], p[..., 0].mean(-1), atol=1e-5, rtol=0)
        seen = torch.stack([p[0, :, :WINDOW, 0].mean(-1), p[1, :, :, 0].mean(-1)])
        torch.testing.assert_close(shares["visible"].per_prompt[i], seen, atol=1e-5, rtol=0)
    # the window makes the difference, here by a factor of 64 / 16
    torch.testing.assert_close(shares["visible"].per_prompt[0, 0], 4 * shares["all"].per_prompt[0, 0])


def needles(places):
    """Prompts of 64 tokens whose answer is at one of the places."""
    return Prompts.from_ids(
        [tokens(TOKENS, i) for i in range(len(places))],
        spans=[{"answer": (at, at + 4), "distractor": (20, 23), "context": (0, 40)} for at in places],
    )


REPLIES = {
    "retrieval": partial(identify.retrieval, recall=-1.0, max_new_tokens=4),
    "retrieval_forced": partial(identify.retrieval, form="forced"),
    "semantic_retrieval": partial(identify.semantic_retrieval, recall=-1.0, max_new_tokens=4),
    "retrieval_reasoning": partial(identify.retrieval_reasoning, recall=-1.0, max_new_tokens=4),
}


@pytest.mark.parametrize("name", REPLIES)
def test_an_answer_outside_of_the_window_is_no_score(windowed, name):
    """The last token, 63, sees tokens 48 to 63: nothing of the first answer, one token of the second, all of the third.

    Three tokens later, the window has left the second answer, and no head may lose its score by that.
    """
    scores = REPLIES[name](windowed, needles((40, 45, 52)), batch_size=2)
    assert scores.per_prompt[:, 0].isnan().all(-1).tolist() == [True, False, False]
    assert not scores.per_prompt[:, 1].isnan().any()
    assert not scores.per_prompt[1:].isnan().any()
    if name == "retrieval_reasoning":
        assert scores.extras["distractor"][:, 0].isnan().all()
        assert not scores.extras["distractor"][:, 1].isnan().any()


def test_lookback_to_a_context_outside_of_the_window(windowed):
    scores = identify.lookback(windowed, needles((40,)), context="context", max_new_tokens=4)
    whole = identify.lookback(windowed, needles((40,)), max_new_tokens=4)
    assert scores.per_prompt[:, 0].isnan().all()
    assert not scores.per_prompt[:, 1].isnan().any()
    assert not whole.per_prompt.isnan().any()


def test_the_best_distance_is_one_that_the_window_reaches(eager):
    with torch.random.fork_rng(devices=[]):
        model = tf.AutoModelForCausalLM.from_config(
            tf.MistralConfig(**families.GROUPED, **families.HEAD, num_hidden_layers=2, sliding_window=4)
        ).eval()
    prompts = Prompts.from_ids([tokens(30), tokens(21, 1)])
    scores = identify.positional(model, prompts)
    offsets = scores.extras["offsets"]
    assert offsets[..., 4:].isnan().all()
    for i, prompt in enumerate(prompts):
        p = eager(model, prompt)
        mean = torch.stack([p.diagonal(-delta, -2, -1).mean(-1) for delta in range(4)], -1)
        torch.testing.assert_close(offsets[i, ..., :4], mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores.per_prompt[i], mean.amax(-1), atol=1e-5, rtol=0)


def test_a_document_outside_of_the_window_has_no_score(windowed):
    spans = {"documents": [(2, 12), (20, 40), (50, 58)], "query": (60, 64)}
    prompts = Prompts.from_ids([tokens(TOKENS)] * 2, spans=[{**spans, "gold": [at]} for at in ((20, 40), (50, 58))])
    scores = {metric: identify.qrhead(windowed, prompts, prompts, metric=metric) for metric in ("score", "ndcg")}
    assert scores["score"].per_prompt[:, 0].isnan().all(-1).tolist() == [True, False]
    # a ranking needs all documents
    assert scores["ndcg"].per_prompt[:, 0].isnan().all()
    for each in scores.values():
        assert not each.per_prompt[:, 1].isnan().any()
        assert each.extras["documents"][0, 0].isnan().all(0).tolist() == [True, True, False]


def test_an_instruction_outside_of_the_window_has_no_focus(windowed):
    spans = [{"instruction": (1, 8), "data": (50, 58)}] * 2
    normal, attacked = (Prompts.from_ids([tokens(TOKENS, i), tokens(60, i)], spans=spans) for i in (0, 5))
    scores = identify.attention_tracker(windowed, normal, attacked)
    assert scores.per_prompt[:, 0].isnan().all()
    assert not scores.per_prompt[:, 1].isnan().all()
    assert scores.n_scored <= 4


def test_an_option_outside_of_the_window_has_no_choice(windowed):
    # layer 0 sees the last two of three options, and would point at the third whenever it is right
    ids = tokens(TOKENS)
    places = [(30, 33), (50, 53), (55, 58)]
    for _, stop in places:
        ids[stop - 1] = 7
    prompts = Prompts.from_ids([ids] * 3, spans=[{"options": places}] * 3, meta=[{"option": i} for i in range(3)])
    for attention in (False, True):
        scores = identify.qk_score(windowed, prompts, attention=attention, right_only=False)
        assert scores.per_prompt[:, 0].isnan().all()
        assert (scores.per_prompt[:, 1].sum(0) == 1).all()
