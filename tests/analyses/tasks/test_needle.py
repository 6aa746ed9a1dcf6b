"""Needles: what the prompts promise, and what the judge accepts."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers_tiny import byte_fallback, byte_level

from interp.analyses.tasks import judge, needle, rouge1_recall
from interp.analyses.tasks.haystack import paragraphs
from interp.analyses.tasks.needle import FILLERS, draw, grammar, judge_is_final, words
from interp.errors import InterpError, UsageError
from interp.hooks.prompts.prompts import Prompt

COMMON = FILLERS | set(words("is are was were be what which who where how did do does that this it its by every has"))


def content(text):
    return {word for word in words(text) if word not in COMMON}


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids))


def said(prompt, name, tokenizer):
    return [decoded(tokenizer, prompt.ids[start:stop]).strip() for start, stop in prompt.spans[name]]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("kind", ["literal", "inferred"])
def test_spans_are_the_exact_texts(chat, trim, kind):
    tokenizer = byte_level(trim=trim, bos=not chat, chat=chat)
    for prompt in needle(tokenizer, lengths=(1500,), n=5, needles=3, kind=kind):
        (sentence,), (answer,) = said(prompt, "needle", tokenizer), said(prompt, "answer", tokenizer)
        (context,), (question,) = said(prompt, "context", tokenizer), said(prompt, "question", tokenizer)
        assert answer == prompt.meta["answer"]
        assert sentence.endswith(answer + ".")
        assert question == prompt.meta["question"]
        assert all(distractor in context for distractor in [sentence, *said(prompt, "distractor", tokenizer)])
        assert len(prompt.spans["distractor"]) == 2
        assert prompt.text.count(answer) == 1
        assert prompt.text.endswith(prompt.meta["prefix"])
        assert context in prompt.text.replace(question, "")


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(bos=True, chat=False), byte_fallback()])
def test_length_is_kept_within_a_sentence(tokenizer):
    longest = max(len(sentence) + 2 for sentences in islice(paragraphs(), 500) for sentence in sentences)
    for prompt in needle(tokenizer, lengths=(700, 4001), depths=(0, 0.33, 1)):
        assert prompt.meta["length"] - longest - 20 <= len(prompt) <= prompt.meta["length"]


def test_depth_places_the_needle_between_sentences():
    tokenizer = byte_level()
    depths = (0, 0.1, 0.5, 0.9, 1)
    starts = []
    for prompt in needle(tokenizer, lengths=(6000,), depths=depths):
        (low, high), (start, stop) = prompt.spans["context"][0], prompt.spans["needle"][0]
        starts.append((start - low) / (high - low - (stop - start)))
        before = decoded(tokenizer, prompt.ids[:start])
        assert start - low <= 1 or before.rstrip().endswith(".")
    assert starts == pytest.approx(depths, abs=0.03)
    assert starts == sorted(starts)


def test_the_grid_is_cycled():
    cells = [(p.meta["length"], p.meta["depth"]) for p in needle(byte_level(), lengths=(800, 1000), depths=(0, 1), n=5)]
    assert cells == [(800, 0), (800, 1), (1000, 0), (1000, 1), (800, 0)]
    assert len(needle(byte_level(), lengths=(800, 1000), depths=(0, 0.5, 1))) == 6


@pytest.mark.parametrize("kind", ["literal", "inferred"])
def test_question_and_prefix_do_not_give_the_answer(kind):
    for seed in range(10):
        for (fact,) in draw(len(grammar()["facts"]), 1, kind, seed):
            asked = content(f"{fact.question} {fact.prefix}")
            assert not asked & content(fact.answer), fact
            assert fact.sentence.count(fact.answer) == 1
            assert "{" not in fact.sentence + fact.question + fact.prefix
            if kind == "inferred":
                assert not asked & content(fact.sentence), fact
            else:
                assert fact.prefix + f" {fact.answer}." == 'The text says: "' + fact.sentence


def test_facts_are_many_and_distinct():
    templates = grammar()["facts"]
    assert len(templates) >= 40
    assert len({template["key"] for template in templates}) == len(templates)
    assert len({row[0].answer for row in draw(300, 1, "literal", 0)}) == 300
    first = draw(len(templates), 3, "literal", 0)
    assert len({row[0].key for row in first}) == len(templates)
    assert all(len({fact.key for fact in row}) == 3 for row in first)


def test_without_needles_only_the_needle_is_missing():
    told, untold = (needle(byte_level(), lengths=(900,), needles=n) for n in (1, 0))
    for with_it, without in zip(told, untold, strict=True):
        assert with_it.meta == without.meta
        assert set(without.spans) == {"context", "question"}
        assert without.meta["answer"] not in without.text
        sentence = next(iter(said(with_it, "needle", byte_level())))
        assert with_it.text.replace(sentence, "").split()[:40] == without.text.split()[:40]


def test_prompts_depend_on_seed_and_place_only():
    tokenizer = byte_level()
    five = needle(tokenizer, lengths=(800,), n=5)
    assert five[:2] == needle(tokenizer, lengths=(800,), n=2)
    other = needle(tokenizer, lengths=(800,), n=5, seed=1)
    assert len({prompt.text for prompt in (*five, *other)}) == 10
    single, triple = needle(tokenizer, lengths=(900,), needles=1), needle(tokenizer, lengths=(900,))
    assert [p.meta for p in single] == [p.meta for p in triple]


def test_the_same_in_another_process():
    code = (
        "from tokenizers_tiny import byte_level; from interp.analyses.tasks import needle, passages, repeated;"
        "print(*(p.fingerprint() for p in (needle(byte_level(), lengths=(800,)), "
        "passages(byte_level(), n=2), repeated(99, shuffled=True))))"
    )
    tests = Path(__file__).parents[2]
    path = os.pathsep.join([str(tests / "helpers"), str(tests.parent)])
    prints = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hashing, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hashing in ("1", "2")
    ]
    assert len(prints[0].split()) == 3
    assert prints[0] == prints[1]


def test_haystack_does_not_repeat_itself():
    # 400 paragraphs are 32k tokens of SmolLM2
    for seed in (0, 1):
        text = list(islice(paragraphs(seed), 400))
        sentences = [sentence for paragraph in text for sentence in paragraph]
        assert len(set(sentences)) == len(sentences)
        assert all(3 <= len(paragraph) <= 6 for paragraph in text)
        assert all(s[0].isupper() and s[-1] in ".?" and "{" not in s and s.isascii() for s in sentences)


ANSWER = "the teal barn at Velmora, with seventy-three pearls"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (f" {ANSWER}.", True),
        (" the TEAL barn, at 'Velmora', with seventy three pearls!", True),
        ("It is a teal barn near Velmora with seventy-three of the pearls", True),
        ("", False),
        (" the teal barn at Velmora", False),
        (" the barn, teal, at Velmora with seventy-three pearls", False),
        (" the teal barns at Velmora with seventy-three pearls", False),
        (" the steal barn at Velmora with seventy-three pearls", False),
        (" the crimson barn at Velmora, with seventy-three pearls", False),
        (" the teal barn at Velmora, with seventy-four pearls", False),
    ],
)
def test_judge(reply, verdict):
    assert judge(reply, Prompt("", (0,), {}, {"answer": ANSWER})) is verdict


@pytest.mark.parametrize(
    ("reply", "final"),
    [
        (ANSWER, False),  # the last word may go on: seventy-three pearls, or pearlstones
        (f"{ANSWER}.", False),
        (f"{ANSWER} a", True),
        (f"{ANSWER}. It is", True),
        (f"{ANSWER}\n", False),
        ("the teal barn at Velmora and seventy-four pearls, no,", False),
        ("", False),
    ],
)
def test_a_verdict_is_final_once_a_word_follows(reply, final):
    prompt = Prompt("", (0,), {}, {"answer": ANSWER})
    assert judge_is_final(reply, prompt) is final
    if final:
        assert all(judge(reply + more, prompt) for more in ("", "s", " but no", "'s", "-"))


def test_judge_refuses_the_distractors():
    for row in draw(42, 3, "literal", 5):
        prompt = Prompt("", (0,), {}, {"answer": row[0].answer})
        assert judge(row[0].sentence, prompt)
        assert not judge(f"{row[0].question} {row[0].prefix} {row[1].sentence} {row[2].sentence}", prompt)


def test_rouge1_recall_clips_counts():
    assert rouge1_recall("a b b c", "b, B! b d") == 0.5
    assert rouge1_recall("one two", "two one three") == 1
    with pytest.raises(UsageError, match="has no words"):
        rouge1_recall(" .", "text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (300,)}, r"length 300 is too short; with one sentence of text the prompt has \d+ tokens"),
        ({"lengths": ()}, "give at least one of each"),
        ({"depths": (1.5,)}, "depths from 0 to 1"),
        ({"kind": "guess"}, "choose from 'literal', 'inferred'"),
        ({"needles": 43}, "use 0 to 42"),
        ({"n": 0}, "ask for at least one prompt"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(InterpError, match=message):
        needle(byte_level(chat=False), **{"lengths": (900,), **settings})


def test_a_template_that_changes_the_text_is_refused():
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | replace('\n\n', ' ') }}{% endfor %}"
    with pytest.raises(InterpError, match="use chat=False"):
        needle(tokenizer, lengths=(900,))


@pytest.mark.slow
def test_demo_answers_all_and_guesses_none(demo):
    model, tokenizer = demo
    for needles, right in ((1, 12), (0, 0)):
        prompts = needle(tokenizer, lengths=(320,), n=12, needles=needles)
        assert sum(judge(answer(model, tokenizer, prompt), prompt) for prompt in prompts) == right


def answer(model, tokenizer, prompt):
    ids = torch.tensor([prompt.ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
