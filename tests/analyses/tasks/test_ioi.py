"""Pairs that differ in one word: where it stands, what is right, and which tokenizers they can be made for."""

import re
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers_tiny import byte_level
from transformers import PreTrainedTokenizerFast

from interp.analyses.measures.continuations import Options
from interp.analyses.tasks import colored, colored_objects, ioi, minimal
from interp.analyses.tasks.ioi import NAMES, PLACES, TEMPLATES, THINGS
from interp.errors import PromptError, UsageError

SETTINGS: dict[str, Any] = {"swapped": (ioi, {}), "abc": (ioi, {"corrupt": "abc"}), "colored": (colored_objects, {})}


def words(*texts):
    """A tokenizer of the words of some texts, punctuation apart."""
    vocab = {"<unk>": 0}
    for word in re.findall(r"\w+|[^\w\s{}]+", " ".join(texts)):
        vocab.setdefault(word, len(vocab))
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


EVERY = words("This is", *TEMPLATES, NAMES, PLACES, THINGS, *colored.TEMPLATES, colored.COLOURS, colored.OBJECTS)


def told(tokenizer, prompt, span):
    ((start, stop),) = prompt.spans[span]
    return tokenizer.decode(prompt.ids[start:stop]).strip()


@pytest.mark.parametrize("case", SETTINGS)
def test_a_pair_differs_in_one_token(case):
    make, settings = SETTINGS[case]
    clean, corrupt = make(EVERY, 40, **settings)
    assert len(clean) == len(corrupt) == 40
    assert clean.lengths == corrupt.lengths
    changed = "asked" if case == "colored" else "s2"
    for one, other in zip(clean, corrupt, strict=True):
        apart = [i for i, (x, y) in enumerate(zip(one.ids, other.ids, strict=True)) if x != y]
        assert apart == [one.spans[changed][0][0]]
        assert one.spans == other.spans
        assert one.meta["id"] == other.meta["id"]
        assert 0 not in one.ids
    options = Options.of(clean + corrupt)
    assert options.right == (1,) * 80
    assert all(len(right) == len(wrong) == 1 and right != wrong for right, wrong in options.ids)
    assert len({prompt.text for prompt in clean}) > 35


@pytest.mark.parametrize("kind", ["swapped", "abc"])
def test_who_is_meant_in_ioi(kind):
    clean, corrupt = ioi(EVERY, 40, corrupt=kind)
    for number, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        io, s1, s2 = (told(EVERY, one, span) for span in ("io", "s1", "s2"))
        assert s1 == s2 != io
        assert (one.meta["right"], one.meta["wrong"]) == ([f" {io}"], [f" {s1}"])
        assert one.meta["order"] == ("BABA" if number % 2 else "ABBA")
        assert (one.spans["io"] < one.spans["s1"]) == (one.meta["order"] == "ABBA")
        third = told(EVERY, other, "s2")
        if kind == "swapped":
            assert third == io
            assert (other.meta["right"], other.meta["wrong"]) == ([f" {s1}"], [f" {io}"])
        else:
            assert third not in (io, s1)
            assert (other.meta["right"], other.meta["wrong"]) == (one.meta["right"], one.meta["wrong"])


def test_which_colour_is_meant():
    clean, corrupt = colored_objects(EVERY, 40)
    for one, other in zip(clean, corrupt, strict=True):
        assert told(EVERY, one, "asked") == told(EVERY, one, "object")
        assert told(EVERY, other, "asked") == told(EVERY, one, "other_object")
        right, wrong = (f" {told(EVERY, one, span)}" for span in ("colour", "other_colour"))
        assert (one.meta["right"], one.meta["wrong"]) == ([right], [wrong])
        assert (other.meta["right"], other.meta["wrong"]) == ([wrong], [right])
        # a thing stands right behind its colour
        assert one.spans["colour"][0][1] == one.spans["object"][0][0]


@pytest.mark.parametrize("case", SETTINGS)
def test_seed_and_place_decide(case):
    make, settings = SETTINGS[case]
    assert make(EVERY, 5, **settings)[0][:2] == make(EVERY, 2, **settings)[0]
    assert make(EVERY, 2, **settings) != make(EVERY, 2, seed=1, **settings)


def test_only_words_of_one_token_are_used():
    few = words("This is", *TEMPLATES, PLACES, THINGS, "Adam Ruth Tom")
    clean, _ = ioi(few, 10)
    assert {told(few, prompt, span) for prompt in clean for span in ("io", "s1")} == {"Adam", "Ruth", "Tom"}


@pytest.mark.parametrize("make", [ioi, colored_objects])
def test_a_tokenizer_that_splits_names_is_refused(make):
    with pytest.raises(PromptError, match=r"0 of \d+ words \(.*\) are single tokens"):
        make(byte_level(), 4)


@pytest.mark.parametrize("make", [ioi, colored_objects])
def test_no_pairs_are_refused(make):
    with pytest.raises(UsageError, match="n=0"):
        make(EVERY, 0)
    with pytest.raises(UsageError, match="corrupt='none' is not valid"):
        ioi(EVERY, 4, corrupt="none")  # pyright: ignore[reportArgumentType]


def test_pairs_of_other_lengths_are_refused():
    with pytest.raises(PromptError, match="pair 0 has 2 and 3 tokens"):
        minimal.encoded(EVERY, [({"text": "This is"}, {"text": "This is the"})])


@pytest.mark.slow
def test_the_demo_model_knows_who_and_what(demo):
    """Measured on 64 pairs each: 98 % prefer the right name, 73 % the right colour."""
    import torch

    from interp.analyses.measures.answer_logits import logit_difference
    from interp.hooks.read.capture import run

    model, tokenizer = demo
    for make, least in ((ioi, 0.9), (colored_objects, 0.6)):
        clean, corrupt = make(tokenizer, 32)
        logits = [
            torch.cat([run(model, part, logits_to_keep=1).logits[:, -1] for part in side.batches(8)]).float()
            for side in (clean, corrupt)
        ]
        better, worse = (logit_difference(each, clean) for each in logits)
        assert (better > 0).float().mean() > least
        assert (better > worse).float().mean() > least
