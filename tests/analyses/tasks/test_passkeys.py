"""Passkeys: lengths, spans, the order of keys, and the control."""

import pytest
from tokenizers_tiny import byte_level

from interp.analyses.tasks.passkeys import ALPHABET, passkeys
from interp.errors import UsageError


def words_of(prompt, tokenizer, name):
    return [tokenizer.decode(list(prompt.ids[slice(*found)])).strip() for found in prompt.spans[name]]


@pytest.mark.parametrize("bos", [False, True])
def test_lengths_fit_and_spans_say_what_is_there(bos):
    tokenizer = byte_level(bos=bos)
    prompts = passkeys(tokenizer, n=4, lengths=(900, 1500), keys=3, words=4)
    for prompt, length in zip(prompts, (900, 1500, 900, 1500), strict=True):
        # tokens of the last sentence are all that is missing
        assert length - 250 < len(prompt) <= length
        told = words_of(prompt, tokenizer, "passkey")
        replies = words_of(prompt, tokenizer, "reply")
        assert len(told) == len(replies) == 3
        for number, sentence, reply in zip(("first", "second", "third"), told, replies, strict=True):
            assert sentence == f"The {number} passkey is {reply}."
            assert len(reply.split()) == 4
            assert set(reply.split()) <= set(ALPHABET.split())
        (tail,) = prompt.spans["tail"]
        (context,) = prompt.spans["context"]
        assert tail[1] == len(prompt)
        assert context[1] <= tail[0]
        assert all(tail[0] <= low < high <= tail[1] for low, high in prompt.spans["reply"])
        assert all(context[0] <= low < high <= context[1] for low, high in prompt.spans["passkey"])
        assert prompt.text.endswith(f"passkey is {replies[-1]}.\n\n")
        assert prompt.meta == {"keys": 3, "words": 4, "length": length, "shuffled": False}


def test_control_asks_for_what_is_not_there():
    tokenizer = byte_level()
    plain, control = (passkeys(tokenizer, n=1, lengths=(900,), keys=3, words=4, shuffled=s)[0] for s in (False, True))
    assert control.spans["passkey"] == plain.spans["passkey"]
    (start, _), (stop, _) = plain.spans["context"][0], plain.spans["tail"][0]
    assert control.ids[start:stop] == plain.ids[start:stop]
    context = control.text[: control.text.index("What is")]
    assert all(reply not in context for reply in words_of(control, tokenizer, "reply"))


def test_seed_and_place_decide():
    tokenizer = byte_level()
    prompts = passkeys(tokenizer, n=3, lengths=(900,), keys=2, words=3)
    assert prompts[:2] == passkeys(tokenizer, n=2, lengths=(900,), keys=2, words=3)
    assert prompts != passkeys(tokenizer, n=3, lengths=(900,), keys=2, words=3, seed=1)
    assert len({prompt.text for prompt in prompts}) == 3


def test_alphabet_has_a_word_for_each_letter():
    assert [word[0] for word in ALPHABET.split()] == [chr(ord("a") + i) for i in range(26)]


@pytest.mark.parametrize("settings", [{"n": 0}, {"keys": 0}, {"keys": 21}, {"words": 0}, {"lengths": ()}])
def test_sizes_without_meaning_are_refused(settings):
    with pytest.raises(UsageError, match="give sizes of at least 1, and at most 20 keys"):
        passkeys(byte_level(), **settings)


def test_a_length_that_holds_nothing_is_refused():
    with pytest.raises(UsageError, match="length 100 is too short; 10 passkeys of 8 words and one sentence take"):
        passkeys(byte_level(), lengths=(100,))
