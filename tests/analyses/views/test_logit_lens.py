"""Tokens that heads write: compared with plain hooks, as sums over attended tokens, and in planted models."""

import types
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tokenizers_tiny
import torch
from bridges import FAMILIES
from patching_oracle import HEADS, LAYERS, TWO, make, projections, recorded
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from interp.analyses import identify
from interp.analyses.views._tokens import token_text
from interp.analyses.views.attention_lens import Lens, extremes, train_lens
from interp.analyses.views.logit_lens import LogitLens, logit_lens
from interp.analyses.views.ov_tokens import OvTokens, ov_tokens
from interp.errors import HeadError, ModelError, ScoreError, SpanError, UsageError
from interp.hooks.model.heads import Head
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.transformerlens.bridge import bridge
from interp.testing import families, planted

ALL = families.VOCAB
POST_NORM = ("gemma2", "olmo2")


def prompts(lengths=(9, 6, 9, 4), seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(10, families.VOCAB, (n,), generator=rng).tolist() for n in lengths]
    spans = [{"early": [(1, 3)], "split": [(0, 1), (2, 4)]} for _ in lengths]
    return Prompts.from_ids(ids, spans=spans, meta=[{"id": f"p{n}"} for n in range(len(lengths))])


def vector(tokens, size=ALL):
    """[v] from a list of all tokens."""
    found = torch.full((size,), torch.nan)
    for token in tokens:
        found[token.id] = token.logit
    return found


def close(found, expected, digits=2e-4):
    torch.testing.assert_close(found, expected, rtol=digits, atol=digits * float(expected.abs().max()))


@pytest.mark.parametrize("name", [*TWO, *POST_NORM])
@torch.no_grad()
def test_logits_are_those_of_plain_hooks(name):
    """z through the slice of the output projection, a norm after attention, the final norm, and the unembedding."""
    model = make(name)
    batch = prompts()
    found = logit_lens(model, batch, "all", k=ALL)
    core: Any = model.base_model
    blocks, norm = (core.h, core.ln_f) if name == "gpt2" else (core.layers, core.norm)
    offset = 1.0 if name == "gemma2" else 0.0
    for number, prompt in enumerate(batch):
        ids = torch.tensor([prompt.ids])
        z, _ = recorded(model, ids, projections(model))
        last = recorded(model, ids, blocks[-1:], output=True)[0][0][0, -1]
        scale = (last.var(unbiased=False) + norm.eps if name == "gpt2" else _square(norm, last)).sqrt()
        for layer in range(LAYERS):
            w_o = projections(model)[layer].weight
            post = blocks[layer].post_attention_layernorm if name in POST_NORM else None
            wrote = recorded(model, ids, [post])[0][0][0, -1] if post is not None else None
            for head in range(HEADS):
                dims = slice(head * 16, head * 16 + 16)
                x = z[layer][0, -1, dims] @ (w_o[dims] if name == "gpt2" else w_o[:, dims].T)
                if post is not None:
                    x = x / _square(post, wrote).sqrt() * (post.weight + offset)
                x = x - x.mean() if name == "gpt2" else x
                expected = model.lm_head.weight @ (x / scale * (norm.weight + offset))
                close(vector(found.of((layer, head), number)), expected)


def _square(norm, x):
    return x.square().mean() + getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))


@pytest.mark.parametrize("name", FAMILIES)
def test_differences_of_logits_are_those_of_logit_attribution(name):
    model, batch = make(name), prompts()
    answers = [(7, 8), (20, 30), (5, 9), (11, 12)]
    # only prompts count on which the right answer has the higher logit, so each pair is given both ways
    one, other = (identify.logit_attribution(model, batch, pairs) for pairs in (answers, [(w, r) for r, w in answers]))
    assert torch.equal(one.per_prompt.isnan(), ~other.per_prompt.isnan())
    scores = torch.where(one.per_prompt.isnan(), -other.per_prompt, one.per_prompt)
    found = logit_lens(model, batch, "all", k=ALL)
    for number, (right, wrong) in enumerate(answers):
        for head in one:
            logits = vector(found.of(head, number))
            expected = scores[number, head.layer, head.head]
            difference = logits[right] - logits[wrong]
            torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize("queries", ["last", "split"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_is_the_sum_of_ov_tokens_weighted_by_attention(name, queries):
    model, batch = make(name), prompts()
    heads = "L0H1 L0H2 L1H0 L1H3"
    whole = logit_lens(model, batch, heads, k=ALL, queries=queries)
    parts = ov_tokens(model, batch, heads, (0, 100), k=ALL, queries=queries)
    assert whole.heads == parts.heads == ("L0H1", "L0H2", "L1H0", "L1H3")
    for number, prompt in enumerate(batch):
        last = len(prompt) - 1 if queries == "last" else 3
        assert whole.queries[number] == parts.queries[number] == (str(prompt.ids[last]), prompt.ids[last], last)
        for head in whole.heads:
            read = parts.of(head, number)
            assert [reading.token.id for reading in read] == list(prompt.ids[: last + 1])
            assert [reading.token.position for reading in read] == list(range(last + 1))
            shares = torch.tensor([reading.attention for reading in read])
            # a learned sink keeps the rest
            assert float(shares.sum()) == pytest.approx(1, abs=1e-3) or name == "gpt_oss"
            made = sum(share * vector(reading.writes) for share, reading in zip(shares, read, strict=True))
            close(made, vector(whole.of(head, number)))
            for reading in read:
                order = [token.id for token in reading.writes]
                assert order.index(reading.token.id) == reading.rank


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_prompts_of_several_lengths_are_as_one_by_one(name):
    model, batch = make(name), prompts()
    settings: Any = {"k": 3}
    for function in (logit_lens, partial(ov_tokens, span="early")):
        together = function(model, batch, "L0H1 L1H3", batch_size=3, **settings)
        for number in range(len(batch)):
            alone = function(model, batch[number : number + 1], "L0H1 L1H3", **settings)
            for head in together.heads:
                _same(together.of(head, number), alone.of(head))


def _same(one, other):
    if isinstance(one, float):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-6)
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            _same(*pair)
    else:
        assert one == other


def test_the_most_raised_come_first_and_the_most_lowered_first_on_their_side():
    model, batch = make("llama"), prompts()
    every = logit_lens(model, batch, "L1H2", k=ALL)
    few = logit_lens(model, batch, "L1H2", k=4)
    for number in range(len(batch)):
        logits = vector(every.of("L1H2", number))
        assert [token.id for token in few.of("L1H2", number)] == logits.topk(4).indices.tolist()
        assert [token.id for token in few.lowered[number][0]] == (-logits).topk(4).indices.tolist()


def test_a_span_is_read_at_its_last_token_and_nothing_after_it_counts():
    model, batch = make("llama"), prompts()
    short = Prompts.from_ids([prompt.ids[:3] for prompt in batch])
    at_span, alone = (
        logit_lens(model, some, "L1H2", queries=where) for some, where in ((batch, "early"), (short, "last"))
    )
    for side in ("raised", "lowered"):
        _same(getattr(at_span, side), getattr(alone, side))
    assert at_span.labels == ("p0", "p1", "p2", "p3")
    assert alone.labels[:2] == ("prompt 0", "prompt 1")


@pytest.mark.parametrize(
    ("span", "expected"), [("early", [1, 2]), ("split", [0, 2, 3]), (2, [2]), (range(1, 3), [1, 2])]
)
def test_spans_by_name_position_and_range(span, expected):
    view = ov_tokens(make("llama"), prompts(), "L0H0", span)
    assert [reading.token.position for reading in view.of("L0H0", 2)] == expected


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_planted_copying_head_writes_the_answer_and_copies_the_needle(family, shuffled):
    """Its query weights shuffled it still copies what it is shown, but no longer finds what to show."""
    model = planted.make("retrieval", 1, family, shuffled=shuffled)
    task = planted.prompts("retrieval", 1)
    batch = Prompts.from_ids(task.ids, spans=task.spans, meta=task.meta, pad_id=planted.PAD)
    view = logit_lens(model.model, batch, [model.head], k=1)
    hits = [
        view.of(model.head, number)[0].id == prompt.meta["answer_ids"][0] for number, prompt in enumerate(batch)
    ]  # fmt: skip
    assert all(hits) != shuffled
    others = [head for head in every_head() if head not in (model.head, model.helper)]
    read = ov_tokens(model.model, batch, [model.head, *others], "answer")
    assert read.copying(model.head) == 1.0
    assert max(read.copying(head) for head in others) < 0.5
    assert all(reading.writes[0].id == reading.token.id for reading in read.of(model.head))
    if not shuffled:
        # the key that matches is the one before the answer's second token
        assert max(read.of(model.head), key=lambda reading: reading.attention).token.id == task.meta[0]["answer_ids"][0]


def every_head():
    return [Head(layer, head) for layer in range(planted.LAYERS) for head in range(planted.HEADS)]


def test_copying_counts_ranks_below_top():
    view = ov_tokens(make("llama"), prompts(), "L0H0 L1H1", (0, 4), k=2)
    for head in view.heads:
        ranks = [reading.rank for number in range(4) for reading in view.of(head, number)]
        assert len(ranks) == 16
        for top in (1, 20, ALL):
            assert view.copying(head, top) == sum(rank < top for rank in ranks) / 16
        assert view.copying(head, ALL) == 1.0


def test_a_lens_serves_its_layer_and_no_other():
    model, batch = make("llama"), prompts()
    plain = logit_lens(model, batch, "L0H1 L1H1", k=ALL)
    # the unembedding for every head: nothing changes
    _same(logit_lens(model, batch, "L0H1 L1H1", k=ALL, lens=Lens.plain(model, 1)).raised, plain.raised)
    lens = train_lens(model, batch, 1, steps=20)
    found = logit_lens(model, batch, "L0H1 L1H1", k=ALL, lens=lens)
    assert found.lens == 1
    _same([prompt[0] for prompt in found.raised], [prompt[0] for prompt in plain.raised])
    changed = (vector(found.of("L1H1")) - vector(plain.of("L1H1"))).abs().max()
    assert changed > 0.01 * vector(plain.of("L1H1")).abs().max()
    with pytest.raises(UsageError, match="the lens is of layer 1"):
        logit_lens(model, batch, "L0", lens=lens)
    with pytest.raises(ScoreError, match="this lens belongs to"):
        logit_lens(families.make("llama", seed=5), batch, "L1", lens=lens)


@pytest.mark.parametrize("held", [1, 300, 1 << 25])
def test_extremes_in_parts_are_those_of_the_whole(held, monkeypatch):
    monkeypatch.setattr("interp.analyses.views.attention_lens.MAX_LOGITS", held)
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 8, generator=rng), torch.randn(8, 5000, generator=rng)
    bias, own = torch.randn(5000, generator=rng), torch.tensor([0, 4999, 7, 2048, 1024])
    (up, best), (down, worst), rank = extremes(x, weight, bias, 7, own)
    logits = x @ weight + bias
    torch.testing.assert_close(up, logits.topk(7).values)
    assert torch.equal(best, logits.topk(7).indices)
    assert torch.equal(worst, logits.topk(7, largest=False).indices)
    torch.testing.assert_close(down, logits.topk(7, largest=False).values)
    expected = [(logits[i] > logits[i, token]).sum() for i, token in enumerate(own)]
    assert rank.tolist() == [int(count) for count in expected]


def test_files_give_back_every_number(tmp_path):
    model, batch = make("llama"), prompts()
    for view in (logit_lens(model, batch, "L0H1 L1H1"), ov_tokens(model, batch, "L0H1 L1H1", "early")):
        again = type(view).load(view.save(tmp_path / type(view).__name__), model)
        assert (again.heads, again.labels, again.queries, again.provenance) == (
            view.heads,
            view.labels,
            view.queries,
            view.provenance,
        )
        for head in view.heads:
            for number in range(len(batch)):
                assert again.of(head, number) == view.of(head, number)
        with pytest.raises(ScoreError, match="belong"):
            type(view).load(tmp_path / type(view).__name__, families.make("llama", seed=5))


def test_frames_and_summaries_list_the_tokens():
    model, batch = make("llama"), prompts()
    view = logit_lens(model, batch, "L0H1 L1H1", k=3)
    frame = view.to_frame()
    assert len(frame) == 2 * 4 * 2 * 3
    first = frame[(frame["head"] == "L1H1") & (frame["side"] == "raised") & (frame["prompt"] == "p2")]
    assert list(first["id"]) == [token.id for token in view.of("L1H1", 2)]
    assert "L1H1" in view.summary()
    read = ov_tokens(model, batch, "L0H1", "early", k=2)
    assert list(read.to_frame()["position"]) == [1, 2] * 4
    assert "L0H1" in read.summary()


def test_tokens_of_no_span_are_the_answer_or_the_last_ones():
    model, batch = make("llama"), prompts()
    view = ov_tokens(model, batch, "L0H0")
    assert [reading.token.position for reading in view.of("L0H0", 0)] == list(range(1, 9))
    assert view.span == "last 8 tokens"
    answers = Prompts.from_ids([prompt.ids for prompt in batch], spans=[{"answer": (1, 2)}] * 4)
    view = ov_tokens(model, answers, "L0H0")
    assert (view.span, [reading.token.position for reading in view.of("L0H0", 3)]) == ("answer", [1])


def test_parts_that_do_not_fit_are_refused():
    model, batch = make("llama"), prompts()
    view, read = logit_lens(model, batch, "L0H1 L1H1", k=2), ov_tokens(model, batch, "L0H1 L1H1", "early", k=2)
    assert (type(view), type(read)) == (LogitLens, OvTokens)
    for change in ({"heads": ("L0H1",)}, {"labels": ("one",)}, {"raised_ids": view.raised_ids[:1]}):
        # the shape checks of the tests may refuse first, with a TypeError
        with pytest.raises((ScoreError, TypeError)):
            replace(view, **change)
    for change in ({"heads": ("L0H1",)}, {"ranks": read.ranks[:1]}, {"ids": read.ids[:, :1]}):
        # the shape checks of the tests may refuse first, with a TypeError
        with pytest.raises((ScoreError, TypeError)):
            replace(read, **change)


@pytest.mark.parametrize("function", [logit_lens, ov_tokens])
def test_bad_input(function):
    model, batch = make("llama"), prompts()
    more = {"span": "early"} if function is ov_tokens else {}
    for k in (0, ALL + 1):
        with pytest.raises(UsageError, match=f"k={k} tokens of a vocabulary of {ALL} were requested"):
            function(model, batch, "L0H0", k=k, **more)
    with pytest.raises(HeadError, match="L9H0"):
        function(model, batch, "L9H0", **more)
    with pytest.raises(HeadError, match="no heads were given"):
        function(model, batch, [], **more)
    with pytest.raises(SpanError, match='no span "late"'):
        function(model, batch, "L0H0", queries="late", **more)
    with pytest.raises(UsageError, match="batch_size=0"):
        function(model, batch, "L0H0", batch_size=0, **more)
    with pytest.raises(ModelError, match="training mode"):
        function(families.make("llama").train(), batch, "L0H0", **more)
    view = function(model, batch, "L0H0", **more)
    with pytest.raises(HeadError, match="L1H0 is not in this view"):
        view.of("L1H0")
    with pytest.raises(UsageError, match="prompt 4 of a view of 4"):
        view.of("L0H0", 4)


def test_spans_that_are_not_read():
    model, batch = make("llama"), prompts()
    with pytest.raises(SpanError, match="prompt 0 has no token of span 5 up to position 2"):
        ov_tokens(model, batch, "L0H0", 5, queries="early")
    with pytest.raises(SpanError, match="not a span"):
        ov_tokens(model, batch, "L0H0", (3, 1))


def test_a_gate_after_attention_is_refused_by_the_view_of_values():
    """The attention function is the usual one, and the module multiplies its output before the projection."""
    model, batch = families.make("llama"), prompts()

    def gated(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        q, k, v = (
            part(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(1.5 * out.flatten(-2)), weights

    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(gated, layer.self_attn)
    logit_lens(model, batch, "L0H0")
    with pytest.raises(ModelError, match="not the sum of their values weighted by attention"):
        ov_tokens(model, batch, "L0H0", "early")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_open_bridge_is_used_and_the_model_is_left_as_it_was(name):
    model, batch = make(name), prompts()
    before = model(torch.tensor([batch[0].ids])).logits
    expected = [logit_lens(model, batch, "L1"), ov_tokens(model, batch, "L1", "early")]
    with bridge(model) as tl:
        found = [logit_lens(tl, batch, "L1"), ov_tokens(tl, batch, "L1", "early")]
    for one, other in zip(found, expected, strict=True):
        for head in other.heads:
            for number in range(len(batch)):
                _same(one.of(head, number), other.of(head, number))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(torch.tensor([batch[0].ids])).logits, before)


def test_sixteen_bits(tiny_model):
    model: Any = families.make("llama")
    model = model.to(torch.bfloat16)
    exact, found = (logit_lens(some, prompts(), "L1H1", k=ALL) for some in (tiny_model("llama"), model))
    expected = vector(exact.of("L1H1"))
    assert (vector(found.of("L1H1")) - expected).abs().max() < 0.1 * expected.abs().max()
    ov_tokens(model, prompts(), "L1H1", "early")


def test_texts_of_tokens():
    bytes_: Any = tokenizers_tiny.byte_level()
    ids = {text: bytes_.convert_tokens_to_ids(text) for text in ("Ġthe", "ð", "Ċ", "the")}
    assert [token_text(bytes_, token) for token in ids.values()] == [" the", "ð", "\n", "the"]
    pieces: Any = tokenizers_tiny.byte_fallback()
    assert token_text(pieces, pieces.convert_tokens_to_ids("▁")) == " "
    assert token_text(pieces, pieces.convert_tokens_to_ids("<0xF0>")) == "<0xF0>"
    # the rows of an embedding can be more than the vocabulary
    assert token_text(bytes_, 100_000) == "100000"
    assert token_text(None, 7) == "7"
