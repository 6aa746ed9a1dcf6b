"""Lookback ratios: against eager attention at each token, on text of a user's own, with their errors."""

import capture_oracle
import pytest
import torch
from detectors import prompts as planted_prompts

from interp.analyses import identify, tasks
from interp.analyses.identify.lookback import lookback_features
from interp.errors import PromptError, SpanError
from interp.hooks.generate import Reply, generate
from interp.hooks.prompts.prompts import Prompts
from interp.testing import planted


def assert_features_equal_eager_attention(model, eager, prompts, replies, context, found):
    """found [n l h t] token by token: the mean over the context, beside the mean over what is written."""
    for row, prompt, reply in zip(found, prompts, replies, strict=True):
        n = len(prompt)
        p = eager(model, Prompts.from_ids([[*prompt.ids, *reply.ids]])[0])
        keys = slice(0, n) if context is None else slice(*prompt.spans[context][0])
        assert row[..., 0].isnan().all()
        assert row[..., len(reply.ids) :].isnan().all()
        for t in range(1, len(reply.ids)):
            c = p[:, :, n + t - 1, keys].mean(-1)
            g = p[:, :, n + t - 1, n : n + t].mean(-1)
            torch.testing.assert_close(row[..., t], c / (c + g), atol=1e-4, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gpt_oss"])
@pytest.mark.parametrize("context", [None, "mark"])
def test_features_equal_eager_attention_token_by_token(tiny_model, eager, name, context):
    model = tiny_model(name)
    prompts = capture_oracle.prompts((20, 27, 24))
    replies = [Reply(tuple(range(10, 10 + n)), "") for n in (7, 1, 12)]
    found = lookback_features(model, prompts, replies, context=context, batch_size=2)
    assert found.shape == (3, 2, 4, 12)
    assert_features_equal_eager_attention(model, eager, prompts, replies, context, found)
    scores = identify.lookback(model, prompts, replies=replies, context=context)
    torch.testing.assert_close(scores.per_prompt, found.nanmean(-1), equal_nan=True)
    assert scores.per_prompt[1].isnan().all()
    assert scores.counted == 2


@pytest.mark.parametrize("context", [None, "needle"])
def test_features_equal_eager_attention_on_the_demo_model(demo, eager, context):
    model, tokenizer = demo
    prompts = tasks.needle(tokenizer, lengths=(160,), n=2, seed=5)
    replies = generate(model, prompts, max_new_tokens=12)
    assert min(len(reply.ids) for reply in replies) > 4
    found = lookback_features(model, prompts, replies, context=context)
    assert_features_equal_eager_attention(model, eager, prompts, replies, context, found)
    scores = identify.lookback(model, prompts, replies=replies, context=context)
    torch.testing.assert_close(scores.per_prompt, found.nanmean(-1), atol=1e-4, rtol=0)


def test_without_replies_the_model_writes_them(tiny_model):
    model = tiny_model("llama")
    prompts = capture_oracle.prompts((20, 27))
    replies = generate(model, prompts, max_new_tokens=6)
    own = identify.lookback(model, prompts, max_new_tokens=6)
    given = identify.lookback(model, prompts, replies=replies)
    torch.testing.assert_close(own.per_prompt, given.per_prompt, equal_nan=True)
    assert own.labels == tuple(f"{len(reply.ids)} tokens written" for reply in replies)


def test_errors_say_what_to_do(tiny_model):
    model, prompts = tiny_model("llama"), capture_oracle.prompts()
    with pytest.raises(PromptError, match="1 replies and 2 prompts do not match; give one reply"):
        identify.lookback(model, prompts, replies=[Reply((5, 6), "")])
    with pytest.raises(SpanError, match='prompt 0 has no span "needle"'):
        identify.lookback(model, prompts, replies=[Reply((5, 6), "")] * 2, context="needle")


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_the_head_that_copies_from_the_prompt_looks_back_and_the_previous_token_head_does_not(family):
    controls = []
    for seed in range(12):
        truth = planted.make("retrieval", seed, family)
        batch = planted_prompts("retrieval", seed)
        scores = identify.lookback(truth.model, batch)
        assert scores.counted == 4
        assert scores.top(1) == [truth.head], seed
        assert scores[truth.head] > 0.98, seed
        # it reads the prompt once, at the second token of the four, and what is written after that
        assert scores[truth.helper] == pytest.approx(1 / 3, abs=0.1), seed
        shuffled = planted.make("retrieval", seed, family, shuffled=True)
        controls.append(identify.lookback(shuffled.model, batch, max_new_tokens=8)[truth.head])
    # a sharp head with a random query looks at few tokens, in some seeds by chance at those of the prompt
    assert sum(controls) / len(controls) < 0.9
    assert min(controls) < 0.7
