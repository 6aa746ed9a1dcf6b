"""A context that comes twice and stops before a word of several tokens, to see where a head looks to write it."""

from dataclasses import replace
from random import Random
from typing import Any, Literal

from interp.analyses.tasks import haystack, needle
from interp.analyses.tasks.task import data
from interp.errors import PromptError, UsageError
from interp.hooks.model.bos import first_tokens
from interp.hooks.prompts.encoding import padding_id
from interp.hooks.prompts.prompts import Prompt, Prompts

FRAMES = (
    "The last word in the notebook was {entity}, and nobody knew why.",
    "On the first page somebody had drawn the {entity} with a blue pencil.",
    "In the second half of the talk she turned to {entity} and took her time.",
    "At the end of the corridor hung an old picture of {entity} in a frame.",
    "Most of the letters mention {entity} in the first or the second line.",
    "The children were asked to write a few lines about {entity} before noon.",
)
INVENTED = ("name", "town")
LENGTH = 30
"""tokens before the new line of a prompt of shuffled tokens"""
MAX_TOKENS = 5
"""largest number of tokens of a word"""
MIN_WORDS = 4
"""words of a number of tokens, below which the number is left out"""


def entities(
    tokenizer: Any,
    *,
    n: int = 16,
    min_tokens: int = 2,
    context: Literal["shuffled", "text"] = "shuffled",
    random: bool = False,
    seed: int = 0,
) -> Prompts:
    """Make `n` prompts of a context with a word of several tokens, a new line, and the same context up to the word.

    With `context="shuffled"` a prompt is `[BOS?] a_1 ... a_i word b_1 ... b_j newline a_1 ... a_i`. The tokens a and b
    are those of two texts in random order, i is at least 15, and the part before the new line has 30 tokens. Nothing
    but the repetition tells which token comes next.

    The word is a common word, a country or a city from the lists of this project, of `min_tokens` to 5 tokens; the
    numbers that enough words have take turns. Span: "entity", the word before the new line. Meta: id, entity, context,
    random.

    Args:
        tokenizer: The tokenizer of the model.
        n: Number of prompts.
        min_tokens: Smallest number of tokens of the word, 2 to 5.
        context: "shuffled" for tokens of texts in random order; "text" for two sentences, which a model can also
            continue by their meaning.
        random: Make the control, in which as many random tokens of a text replace the word; all else is as in the
            prompt of the same number.
        seed: Seed from which all prompts are drawn; prompt i depends on the seed and on i, not on the number.

    Returns:
        Prompts: The prompts.

    Raises:
        UsageError: If `n` is below 1, `min_tokens` is not from 2 to 5, or the context is unknown.
        PromptError: If too few words have so many tokens.

    Source:
        Feucht et al. 2504.03022, attention scores by the released code.

    Differs:
        Uses other words and texts; those of the paper are entities of CounterFact and documents of the Pile.

    Limits:
        Does not show that a model knows the word.
    """
    if n < 1 or not 2 <= min_tokens <= MAX_TOKENS or context not in ("shuffled", "text"):
        raise UsageError(
            f"n={n}, min_tokens={min_tokens}, context={context!r} are not valid; ask for one prompt or more, with "
            f"words of 2 to {MAX_TOKENS} tokens, and the context 'shuffled' or 'text'."
        )
    known = _words()
    by_length: dict[int, list[str]] = {}
    for word in known:
        if min_tokens <= (size := len(_placed(tokenizer, word))) <= MAX_TOKENS:
            by_length.setdefault(size, []).append(word)
    sizes = sorted(size for size, words in by_length.items() if len(words) >= MIN_WORDS)
    if not sizes:
        raise PromptError(
            f"fewer than {MIN_WORDS} of {len(known)} words have the same number of tokens from {min_tokens} to "
            f"{MAX_TOKENS} for this tokenizer; ask for fewer tokens, or use another tokenizer."
        )
    make = _shuffled if context == "shuffled" else _in_text
    prompts = []
    for i in range(n):
        rng = Random(f"entities/{seed}/{i}")
        meta = {"id": f"entities/{seed}/{i}", "context": context, "random": random}
        prompt = make(tokenizer, rng.choice(by_length[sizes[i % len(sizes)]]), meta, rng)
        prompts.append(_mixed(tokenizer, prompt) if random else prompt)
    return Prompts(tuple(prompts), tokenizer, padding_id(tokenizer))


def _shuffled(tokenizer: Any, word: str, meta: dict[str, Any], rng: Random) -> Prompt:
    """The word among the tokens of texts in random order."""
    name, entity = meta["id"], _placed(tokenizer, word)
    before = rng.randint(LENGTH // 2, LENGTH - len(entity))
    first, second = (
        _drawn(tokenizer, size, f"{name}/{place}") for place, size in enumerate((before, LENGTH - before - len(entity)))
    )
    begin, line = first_tokens(tokenizer), tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    start = len(begin) + before
    ids = (*begin, *first, *entity, *second, line, *first)
    return Prompt("", ids, {"entity": ((start, start + len(entity)),)}, {**meta, "entity": word})


def _in_text(tokenizer: Any, word: str, meta: dict[str, Any], rng: Random) -> Prompt:
    """The word in two sentences."""
    before, after = rng.choice(FRAMES).split(" {entity}")
    before = f"{next(haystack.paragraphs(meta['id']))[0]} {before}"
    span = (len(before) + 1, len(before) + 1 + len(word))
    text = f"{before} {word}{after}\n{before}"
    return Prompts.encode(tokenizer, [{"text": text, "spans": {"entity": span}, "meta": {**meta, "entity": word}}])[0]


def _drawn(tokenizer: Any, size: int, seed: str) -> list[int]:
    """The first tokens of a text in random order."""
    rng, source, ids = Random(f"tokens/{seed}"), haystack.paragraphs(seed), []
    while len(ids) < size:
        ids += tokenizer(" ".join(next(source)), add_special_tokens=False)["input_ids"]
    return rng.sample(ids[:size], size)


def _words() -> list[str]:
    """The words of this project's lists, without the invented names and towns."""
    facts = [text.split() for key, text in needle.grammar()["lists"].items() if key not in INVENTED]
    pairs = [pair for relation in data("relations.json").values() for pair in relation]
    every = [word for words in (*facts, *pairs, *haystack.grammar()[0].values()) for word in words]
    return [word for word in dict.fromkeys(every) if word.isalpha()]


def _mixed(tokenizer: Any, prompt: Prompt) -> Prompt:
    """The prompt with random tokens of a text in place of its word."""
    start, stop = prompt.spans["entity"][0]
    # of a whole paragraph, so that they do not always begin it
    drawn = _drawn(tokenizer, 40, f"{prompt.meta['id']}/random")[: stop - start]
    return replace(prompt, text="", ids=(*prompt.ids[:start], *drawn, *prompt.ids[stop:]))


def _placed(tokenizer: Any, word: str) -> list[int]:
    """Tokens of a word that follows another one."""
    both = tokenizer(f"the {word}", add_special_tokens=False)["input_ids"]
    return both[len(tokenizer("the", add_special_tokens=False)["input_ids"]) :]
