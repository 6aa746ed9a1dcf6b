"""Attention on a text is the last row of the eager pattern, for the heads and the prompt that scores choose."""

import pytest
import torch

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.token_attention import TokenAttention, token_attention
from interp.errors import HeadError, ScoreError
from interp.hooks.prompts.prompts import Prompts


def prompts(lengths=(12, 7, 9)) -> Prompts:
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(10, 60, (n,), generator=rng).tolist() for n in lengths]
    return Prompts.from_ids(ids, spans=[{"answer": (1, 3), "other": (0, 1)}] * len(lengths))


def test_weights_are_the_last_row_of_the_eager_pattern(tiny_model, eager):
    model, batch = tiny_model("llama"), prompts()
    found = token_attention(model, batch, ["L1H3", "L0H1"])
    assert found.heads == ("L1H3", "L0H1")
    pattern = eager(model, batch[0])
    expected = torch.stack([pattern[1, 3, -1], pattern[0, 1, -1]])
    torch.testing.assert_close(found.weights, expected, atol=1e-5, rtol=0)
    assert found.marks == {"answer": ((1, 3),)}
    torch.testing.assert_close(found.on("answer"), expected[:, 1:3].sum(-1), atol=1e-5, rtol=0)
    assert found.tokens == tuple(map(str, batch[0].ids))


def test_scores_choose_the_best_heads_and_the_shortest_counted_prompt(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    values = torch.rand(3, 2, 4)
    values[1] = torch.nan
    scores = HeadScores("retrieval", values)
    found = token_attention(model, batch, scores)
    assert found.heads == tuple(map(str, scores.top(8)))
    assert len(found.tokens) == 9
    with pytest.raises(HeadError, match="no head of 'retrieval' scores above 0; give heads by name"):
        token_attention(model, batch, HeadScores("retrieval", torch.zeros(3, 2, 4)))


def test_files_frames_and_summaries(tiny_model, tmp_path):
    model = tiny_model("llama")
    found = token_attention(model, prompts(), "L1H3 L0H1")
    assert found.heads == ("L0H1", "L1H3")
    again = TokenAttention.load(found.save(tmp_path / "one"), model)
    assert torch.equal(again.weights, found.weights)
    assert (again.tokens, again.marks, again.reply) == (found.tokens, found.marks, found.reply)
    frame = found.to_frame()
    assert list(frame.columns) == ["position", "token", "L0H1", "L1H3"]
    assert "L1H3" in found.summary()


def test_wrong_heads_and_weights_are_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(HeadError, match="no heads were given"):
        token_attention(model, prompts(), [])
    with pytest.raises(HeadError, match="L9H0"):
        token_attention(model, prompts(), "L9H0")
    with pytest.raises(ScoreError, match=r"have the shape \[1, 1\], expected \[1, 2\]"):
        TokenAttention("t", ("a", "b"), ("L0H0",), torch.ones(1, 1))
