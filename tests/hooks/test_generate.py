"""Greedy replies: where they end, and whether it was the limit that ended them."""

from dataclasses import replace

import pytest
import tiny_chat_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from interp.hooks.generate import generate
from interp.hooks.prompts.prompts import Prompts

LIMIT = 6


@pytest.fixture
def model():
    return tiny_chat_model.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_chat_model.tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return Prompts.encode(tokenizer, ["Paris in the rain", "the"])


def test_a_reply_without_an_end_is_at_the_limit(model, prompts):
    for limit in (1, LIMIT):
        replies = generate(model, prompts, max_new_tokens=limit)
        assert [(len(reply.ids), reply.at_limit) for reply in replies] == [(limit, True)] * 2
    bare = generate(model, Prompts(prompts.items, None, prompts.pad_id), max_new_tokens=2)
    assert [(reply.text, reply.at_limit) for reply in bare] == [("", True)] * 2


@pytest.mark.parametrize("place", [0, 2, LIMIT - 1])
def test_an_end_token_ends_a_reply_even_as_the_last_one_allowed(model, prompts, place):
    one = prompts[:1]
    (whole,) = generate(model, one, max_new_tokens=LIMIT)
    first = whole.ids.index(whole.ids[place])
    model.generation_config.eos_token_id = whole.ids[place]
    (reply,) = generate(model, one, max_new_tokens=first + 1)
    assert (reply.ids, reply.at_limit) == (whole.ids[:first], False)


def test_a_stop_text_ends_a_reply_too(model, prompts, tokenizer):
    one = prompts[:1]
    (whole,) = generate(model, one, max_new_tokens=LIMIT)
    stop = tokenizer.decode([whole.ids[2]])
    (reply,) = generate(model, one, max_new_tokens=LIMIT, stop=stop)
    assert not reply.at_limit
    assert stop not in reply.text


def test_a_row_that_ends_before_the_others_is_not_at_the_limit(model, prompts):
    one, other = (generate(model, prompts[i : i + 1], max_new_tokens=LIMIT)[0] for i in range(2))
    ends = next((i, token) for i, token in enumerate(one.ids) if token not in other.ids)
    model.generation_config.eos_token_id = ends[1]
    both = generate(model, prompts, max_new_tokens=LIMIT)
    assert [reply.at_limit for reply in both] == [False, True]
    assert both[0].ids == one.ids[: ends[0]]


@pytest.mark.parametrize("place", [1, 3, LIMIT])
@pytest.mark.parametrize("row", [0, 1])
def test_a_row_ends_where_more_text_makes_no_difference(model, prompts, tokenizer, place, row):
    whole = generate(model, prompts, max_new_tokens=LIMIT)
    enough = tokenizer.decode(whole[row].ids[:place])
    seen = []

    def ended(text, prompt):
        seen.append((text, prompt))
        return prompt is prompts[row] and text.startswith(enough)

    replies = generate(model, prompts, max_new_tokens=LIMIT, ended=ended)
    first = next(i for i in range(1, LIMIT + 1) if tokenizer.decode(whole[row].ids[:i]).startswith(enough))
    assert (replies[row].ids, replies[row].at_limit) == (whole[row].ids[:first], False)
    assert replies[row].text == tokenizer.decode(whole[row].ids[:first])
    # the other row goes on, and a row that ended is not asked again
    assert replies[1 - row] == whole[1 - row]
    assert len(seen) == LIMIT + first
    bare = generate(model, Prompts(prompts.items, None, prompts.pad_id), max_new_tokens=2, ended=ended)
    assert [len(reply.ids) for reply in bare] == [2, 2]


def words_of(tokenizer):
    """A tokenizer of whole words, which has no bytes, on which the stop texts of transformers fail."""
    vocab = {f"w{i}": i for i in range(len(tokenizer))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="w0")), unk_token="w0")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize(("start", "width"), [(0, 1), (1, 1), (1, 2), (2, 3), (LIMIT - 1, 1)])
def test_a_stop_text_ends_the_steps_at_the_token_that_completes_it(model, prompts, tokenizer, kind, start, width, n):
    used = tokenizer if kind == "bytes" else words_of(tokenizer)
    given = replace(prompts[:n], tokenizer=used)
    whole = generate(model, given, max_new_tokens=LIMIT)
    stop = str(used.decode(list(whole[0].ids[start : start + width])))

    def completed(ids):
        """The number of tokens with which a row has the stop text, or the limit."""
        return next((i for i in range(1, LIMIT + 1) if stop in used.decode(ids[:i])), LIMIT)

    steps: list[None] = []
    handle = model.register_forward_pre_hook(lambda *_: steps.append(None))
    found = generate(model, given, max_new_tokens=LIMIT, stop=stop)
    handle.remove()
    # the steps end with the last row
    assert len(steps) == max(completed(reply.ids) for reply in whole)
    for reply, row in zip(found, whole, strict=True):
        stopped = stop in used.decode(list(row.ids))
        assert reply.ids == row.ids[: completed(row.ids) - stopped]
        assert reply.at_limit is not stopped
