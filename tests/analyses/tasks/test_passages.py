"""Passages: exact lengths, different texts."""

import pytest
from tokenizers_tiny import byte_level

from interp.analyses.tasks import passages
from interp.errors import UsageError


@pytest.mark.parametrize("length", [1, 2, 63, 256, 1000])
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True)])
def test_every_passage_has_the_length(length, bos, eos):
    tokenizer = byte_level(bos=bos, eos=eos)
    prompts = passages(tokenizer, n=3, length=length)
    assert prompts.lengths == (length,) * 3
    for prompt in prompts:
        assert (prompt.ids[0] == tokenizer.bos_token_id) is bos
        assert tokenizer.eos_token_id not in prompt.ids
        assert tokenizer.decode(list(prompt.ids), skip_special_tokens=True) == prompt.text


def test_texts_differ_and_seed_and_place_decide():
    tokenizer = byte_level()
    prompts = passages(tokenizer, n=8)
    assert len({prompt.text[:60] for prompt in prompts}) == 8
    assert prompts[:3] == passages(tokenizer, n=3)
    assert prompts != passages(tokenizer, n=8, seed=1)


@pytest.mark.parametrize("settings", [{"n": 0}, {"length": 0}])
def test_sizes_below_one_are_refused(settings):
    with pytest.raises(UsageError, match="has to be at least 1"):
        passages(byte_level(), **settings)
