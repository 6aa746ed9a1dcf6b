"""Repeated random tokens: where the copies stand, and that the control has none."""

import pytest
from tokenizers_tiny import byte_level

from interp.analyses.tasks import repeated
from interp.errors import UsageError


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("copies", [1, 2, 4])
def test_copies_stand_in_their_spans(bos, copies):
    prompts = repeated(500, n=20, copies=copies, batch=3, bos=bos)
    for prompt in prompts:
        names = ["first", "second", "copy3", "copy4"][:copies]
        assert list(prompt.spans) == names
        parts = [prompt.ids[start:stop] for name in names for start, stop in prompt.spans[name]]
        assert len(set(parts)) == 1
        assert len(set(parts[0])) == 20
        assert prompt.ids == (() if bos is None else (bos,)) + sum(parts, ())
        assert bos not in parts[0]
        assert all(0 <= i < 500 for i in prompt.ids)
        assert prompt.meta == {"n": 20, "copies": copies, "shuffled": False, "bos": bos is not None}
    assert len({prompt.ids for prompt in prompts}) == 3


def test_induction_target_is_the_token_after_the_earlier_copy():
    for prompt in repeated(500, n=20, bos=3):
        start, stop = prompt.spans["second"][0]
        for i in range(start, stop):
            assert prompt.ids[i - 20] == prompt.ids[i]
            assert i - 20 + 1 <= start
            if i + 1 < stop:
                assert prompt.ids[i - 20 + 1] == prompt.ids[i + 1]


def test_the_control_has_no_earlier_copy():
    told, control = repeated(500, n=20, bos=3), repeated(500, n=20, bos=3, shuffled=True)
    assert told.lengths == control.lengths
    assert told.span("second") == control.span("second")
    for prompt in control:
        assert len(set(prompt.ids)) == len(prompt.ids)


def test_a_small_vocabulary_is_drawn_from_again():
    prompt = repeated(5, n=12, batch=1)[0]
    assert len(prompt) == 24
    assert prompt.ids[:12] == prompt.ids[12:]
    control = repeated(30, n=20, batch=1, shuffled=True)[0]
    assert control.ids[:20] != control.ids[20:]


def test_a_tokenizer_gives_the_first_token_of_its_own_call_and_keeps_its_special_tokens():
    tokenizer = byte_level(pad=True, bos=True)
    prompts = repeated(tokenizer, n=100, batch=4)
    assert prompts.pad_id == tokenizer.pad_token_id
    for prompt in prompts:
        assert prompt.ids[0] == tokenizer.bos_token_id
        assert not {0, 1, 2} & set(prompt.ids[1:])
    assert repeated(tokenizer, n=10, batch=1, bos=9)[0].ids[0] == 9
    assert repeated(tokenizer, n=10, batch=1, bos=False)[0].spans["first"] == ((0, 10),)


def test_a_bos_token_that_the_tokenizer_does_not_add_comes_first_on_request_only():
    tokenizer = byte_level()
    assert repeated(tokenizer, n=10, batch=1)[0].spans["first"] == ((0, 10),)
    assert repeated(tokenizer, n=10, batch=1, bos=True)[0].ids[0] == tokenizer.bos_token_id
    tokenizer.bos_token = None
    for given in (tokenizer, 50):
        with pytest.raises(UsageError, match="bos=True was given without a BOS token"):
            repeated(given, n=10, batch=1, bos=True)


def test_seed_and_place_decide():
    assert repeated(500, batch=5)[:2] == repeated(500, batch=2)
    assert repeated(500, batch=2) != repeated(500, batch=2, seed=1)


@pytest.mark.parametrize("settings", [{"n": 0}, {"copies": 0}, {"batch": 0}])
def test_sizes_below_one_are_refused(settings):
    with pytest.raises(UsageError, match="has to be at least 1"):
        repeated(500, **settings)


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(UsageError, match="leaves no ordinary token"):
        repeated(1, bos=0)
