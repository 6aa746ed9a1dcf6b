"""A needle in a haystack: a made-up fact in a long text, a question about it, and a judge of the reply."""

import json
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate, product
from pathlib import Path
from random import Random
from typing import Any, Literal

from interp.analyses.tasks.haystack import paragraphs
from interp.analyses.tasks.prose import prose, prose_name
from interp.errors import PromptError, UsageError
from interp.hooks.prompts.prompts import Prompt, Prompts

INSTRUCTION = "Read the text and answer the question by quoting a sentence of the text."
QUOTE = 'The text says: "'
"""beginning of a reply that quotes the text"""
N_FACTS = 3
"""facts in a text: the one that the question is about, and two distractors"""
FILLERS = frozenset({"a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "from", "for", "with", "near"})


@dataclass(frozen=True)
class Fact:
    """A made-up fact: `sentence` contains `answer` once, and `prefix` begins the reply to `question`."""

    key: str
    sentence: str
    answer: str
    question: str
    prefix: str
    wording: int = 0
    """number of the wording of sentence and question"""


def needle(
    tokenizer: Any,
    *,
    lengths: Sequence[int] = (512,),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    n: int | None = None,
    needles: int = N_FACTS,
    kind: Literal["literal", "inferred"] = "literal",
    haystack: str | Path | None = None,
    chat: bool | None = None,
    seed: int = 0,
) -> Prompts:
    """Make prompts that can be answered only from one sentence of a long text; each has a different text and fact.

    The text also has distractors: facts of the same kind that the question is not about. A fact has two wordings, each
    with its question, one of which is drawn for each prompt.

    Spans: "needle", "answer" (inside the needle), "distractor" (the other facts), "question", "context". Meta: answer,
    kind, length and depth (as given), key and wording (of the fact), haystack, question, prefix. The reply is prefilled
    with the prefix, with or without a chat template.

    Args:
        tokenizer: The tokenizer of the model.
        lengths: Numbers of tokens of the whole prompt; the text is cut at the last sentence that fits.
        depths: Places of the needle as fractions of the text, 0 first and 1 last, moved to the nearest sentence
            boundary.
        n: Number of prompts, which cycle over lengths x depths (depths fastest); None gives one of each.
        needles: Number of facts in each text; the question is about one, and the others are distractors at random
            depths. 1 leaves out the distractors. 0 leaves out that one too, which is the control on which no reply can
            be right.
        kind: "literal" asks in the words of the needle; "inferred" in other words, so that only association leads to
            it.
        haystack: A folder of texts (.txt, .md or .rst, in UTF-8) whose paragraphs hide the facts; None for prose from
            the grammar of this package. A text begins at a random paragraph of the folder and goes on in its order.
        chat: Use the tokenizer's chat template; None uses it if there is one.
        seed: Seed from which all prompts are drawn; prompt i depends on the seed and on i, not on the number.

    Returns:
        Prompts: The prompts.

    Raises:
        UsageError: If a size is out of range, or a length cannot hold the needle and one sentence.
        PromptError: If the chat template changes the text, or the haystack cannot be read or is shorter than a prompt.

    Examples:
        >>> needles = interp.tasks.needle(tokenizer, lengths=(500,), depths=(0.5,))
        >>> sorted(needles[0].spans)
        ['answer', 'context', 'distractor', 'needle', 'question']

    Source:
        The set-up of Wu et al. 2404.15574.

    Differs:
        Uses other texts and facts, never the same fact twice in a call, and adds distractors.

    Limits:
        Does not show understanding; a literal needle can be answered by copying what followed the prefix. In the prose
        of the grammar the facts stand out, so compare with texts of your own.
    """
    cells = list(product(lengths, depths))
    if not cells or min(lengths) < 1 or not all(0 <= depth <= 1 for depth in depths):
        raise UsageError(
            f"lengths={lengths}, depths={depths} are out of range; give at least one of each, with depths from 0 to 1."
        )
    if kind not in ("literal", "inferred"):
        raise UsageError(f"unknown kind of needle {kind!r}; choose from 'literal', 'inferred'.")
    known = len(grammar()["facts"])
    if not 0 <= needles <= known:
        raise UsageError(f"needles={needles} is out of range; there are {known} facts, so use 0 to {known}.")
    if n is not None and n < 1:
        raise UsageError(
            f"n={n} is too small; ask for at least one prompt, or leave n out for one of each length and depth."
        )
    if chat is None:
        chat = getattr(tokenizer, "chat_template", None) is not None
    facts = draw(len(cells) if n is None else n, max(needles, 1), kind, seed)
    items = []
    for i, target in enumerate(facts):
        length, depth = cells[i % len(cells)]
        rng = Random(f"depths/{seed}/{i}")
        placed = [(depth if j == 0 else rng.random(), fact) for j, fact in enumerate(target)] if needles else []
        item = hide(tokenizer, target[0], placed, length, chat, f"{seed}/{i}", haystack)
        item["meta"] = {
            "answer": target[0].answer,
            "kind": kind,
            "length": length,
            "depth": depth,
            "key": target[0].key,
            "wording": target[0].wording,
            "haystack": "grammar" if haystack is None else prose_name(haystack),
            "question": target[0].question,
            "prefix": target[0].prefix,
        }
        items.append(item)
    return Prompts.encode(tokenizer, items, chat=chat, continue_final=chat)


def judge(reply: str, prompt: Prompt) -> bool:
    """Whether the reply contains every content word of the answer, in order; case and punctuation are ignored.

    Args:
        reply: The reply of the model.
        prompt: The prompt that was answered.

    Returns:
        Whether the reply is right.
    """
    spoken = iter(words(reply))
    return all(word in spoken for word in words(prompt.meta["answer"]) if word not in FILLERS)


def judge_is_final(reply: str, prompt: Prompt) -> bool:
    """Whether `judge` accepts a reply without its last word, so that more text cannot change the verdict.

    Args:
        reply: The reply so far, whose last word may be incomplete.
        prompt: The prompt that is answered.
    """
    return judge(" ".join(reply.split()[:-1]), prompt)


def rouge1_recall(reference: str, text: str) -> float:
    """Share of the reference's words that occur in the text, each as often as both have it; there is no stemming.

    `sum over words of min(count in reference, count in text) / words in reference`, from 0 to 1.

    Args:
        reference: The text whose words are counted.
        text: The text that is judged.

    Returns:
        float: The recall.

    Raises:
        UsageError: If the reference has no words.

    Examples:
        >>> interp.tasks.rouge1_recall("a blue door", "The door is blue")
        0.6666666666666666

    Source:
        Lin 2004, ROUGE-1.
    """
    wanted = Counter(words(reference))
    if not wanted:
        raise UsageError(
            f"the reference {reference!r} has no words, so its recall is undefined; give the answer's text."
        )
    return (wanted & Counter(words(text))).total() / wanted.total()


def words(text: str) -> list[str]:
    """Words in lower case; an apostrophe inside a word is dropped."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"\w+", re.sub(r"(?<=\w)['’](?=\w)", "", plain))


@cache
def grammar() -> dict[str, Any]:
    """The word lists and fact templates of facts.json."""
    return json.loads(files("interp.analyses.tasks").joinpath("facts.json").read_text("utf-8"))


def draw(n: int, needles: int, kind: str, seed: int) -> list[list[Fact]]:
    """For each of n prompts the fact of the question and its distractors, from different templates; no question comes
    twice."""
    templates = grammar()["facts"]
    seen: set[str] = set()
    rows: list[list[Fact]] = []
    for i in range(n):
        turn = Random(f"deck/{seed}/{i // len(templates)}").sample(templates, len(templates))
        first = turn[i % len(templates)]
        rng = Random(f"fact/{seed}/{i}")
        target = fill(first, kind, rng)
        while target.answer in seen:
            target = fill(first, kind, rng)
        seen.add(target.answer)
        others = rng.sample([template for template in templates if template is not first], needles - 1)
        rows.append([target, *(fill(template, kind, rng) for template in others)])
    return rows


def fill(template: Mapping[str, Any], kind: str, rng: Random) -> Fact:
    """A fact with its slots filled: {town} and {town2} differ, and {Town} is {town} with capitals."""
    slots: dict[str, str] = {}
    for name, options in grammar()["lists"].items():
        for suffix, word in zip(("", "2", "3"), rng.sample(options.split(), 3), strict=True):
            slots[name + suffix], slots[name.title() + suffix] = word, word.title()
    answer = template["answer"].format_map(slots)
    wording = rng.randrange(len(template["needle"]))
    sentence = template["needle"][wording].format_map({**slots, "answer": answer})
    # without an instruction to quote, a small model rephrases, or continues from what it knows
    question, prefix = template["question"][wording], QUOTE + template["needle"][wording].removesuffix(" {answer}.")
    if kind == "inferred":
        question, prefix = template["ask"], template["lead"]
    return Fact(template["key"], sentence, answer, question.format_map(slots), prefix.format_map(slots), wording)


def hide(
    tokenizer: Any,
    target: Fact,
    placed: Sequence[tuple[float, Fact]],
    length: int,
    chat: bool,
    seed: str,
    haystack: str | Path | None = None,
) -> dict[str, Any]:
    """The longest prompt of at most `length` tokens, as an item for Prompts.encode with spans in characters."""
    sentences, ends = supply(tokenizer, length, seed, haystack)

    def render(count: int) -> tuple[dict[str, Any], str, list[tuple[int, int]]]:
        context, ranges = compose(sentences[:count], [(depth, fact.sentence) for depth, fact in placed])
        body = f"{INSTRUCTION}\n\n{context}\n\nQuestion: {target.question}"
        if chat:
            turns = [{"role": "user", "content": body}, {"role": "assistant", "content": target.prefix}]
            return {"messages": turns}, context, ranges
        return {"text": f"{body}\nAnswer: {target.prefix}"}, context, ranges

    def encode(count: int) -> Prompt:
        return Prompts.encode(tokenizer, [render(count)[0]], chat=chat, continue_final=chat)[0]

    @cache
    def tokens(count: int) -> int:
        return len(encode(count).ids)

    # the sizes of the sentences give a first estimate; counting whole prompts decides
    fitting = 1
    for _ in range(3):
        fitting = max(1, bisect_right(ends, length - tokens(fitting) + ends[fitting - 1]))
    while fitting and tokens(fitting) > length:
        fitting -= 1
    while fitting and fitting < len(ends) and tokens(fitting + 1) <= length:
        fitting += 1
    if not fitting:
        raise UsageError(f"length {length} is too short; with one sentence of text the prompt has {tokens(1)} tokens.")
    item, context, ranges = render(fitting)
    text = encode(fitting).text
    start = text.find(context)
    question = text.find(target.question, start + len(context))
    if start < 0 or question < 0:
        raise PromptError("the chat template changes the text, so spans are lost; use chat=False.")
    found = [(start + low, start + high) for low, high in ranges]
    spans: dict[str, Any] = {
        "context": (start, start + len(context)),
        "question": (question, question + len(target.question)),
    }
    if found:
        low = found[0][0] + target.sentence.rindex(target.answer)
        spans |= {"needle": found[0], "answer": (low, low + len(target.answer))}
    if found[1:]:
        spans["distractor"] = found[1:]
    return {**item, "spans": spans}


def supply(tokenizer: Any, length: int, seed: str, haystack: str | Path | None = None) -> tuple[list[str], list[int]]:
    """More sentences than a prompt of `length` tokens can hold, and the tokens up to the end of each one."""
    source = paragraphs(seed) if haystack is None else prose(haystack, seed)
    sentences: list[str] = []
    ends: list[int] = [0]
    # a fifth more, since a tokenizer may count the space before a single sentence as another token
    while ends[-1] <= 1.2 * length:
        paragraph = next(source, None)
        if paragraph is None:
            raise PromptError(
                f"the haystack {haystack} has {ends[-1]:,} tokens of prose, but prompts of {length:,} tokens need "
                f"{1.2 * length:,.0f}; add texts, or ask for shorter prompts."
            )
        first, *rest = paragraph
        new = ["\n\n" + first if sentences else first, *(" " + sentence for sentence in rest)]
        sizes = map(len, tokenizer(new, add_special_tokens=False)["input_ids"])
        sentences += new
        ends += [*accumulate(sizes, initial=ends[-1])][1:]
    return sentences, ends[1:]


def compose(sentences: Sequence[str], placed: Sequence[tuple[float, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The text with each needle at the sentence boundary nearest to its depth, and the needles' character ranges.

    Sentences begin with the white space before them. A needle between two paragraphs joins the first of them.
    """
    ends = [0, *accumulate(map(len, sentences))]
    at = [min(range(len(ends)), key=lambda j: abs(ends[j] - depth * ends[-1])) for depth, _ in placed]
    ranges = [(0, 0)] * len(placed)
    text = ""
    for j, sentence in enumerate([*sentences, ""]):
        for i, (_, inserted) in enumerate(placed):
            if at[i] == j:
                start = len(text) + bool(text)
                ranges[i] = (start, start + len(inserted))
                text += " " * bool(text) + inserted
        text += sentence if j or not text else " " + sentence
    return text, ranges
