"""A text that comes twice and stops before a word of several tokens, which shows where a head looks to write the
word."""

from dataclasses import replace
from random import Random
from typing import Any

from interp.analyses.tasks import haystack, needle
from interp.analyses.tasks.repeated import sample
from interp.analyses.tasks.task import data
from interp.errors import PromptError, UsageError
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


def entities(tokenizer: Any, *, n: int = 16, min_tokens: int = 3, random: bool = False, seed: int = 0) -> Prompts:
    """Make `n` prompts of a text, a new line, and the same text again up to a word of several tokens.

    The word is a common word, a country or a city from the lists of this project. Span: "entity", the word in the first
    text. Meta: id, entity, random.

    Args:
        tokenizer: The tokenizer of the model.
        n: Number of prompts.
        min_tokens: Smallest number of tokens of the word.
        random: Make the control, in which as many random tokens replace the word; all else is as in the prompt of the
            same number.
        seed: Seed from which all prompts are drawn; prompt i depends on the seed and on i, not on the number.

    Returns:
        Prompts: The prompts.

    Raises:
        UsageError: If `n` is below 1 or `min_tokens` below 2.
        PromptError: If too few words have so many tokens.

    Source:
        After Feucht et al. 2504.03022.

    Differs:
        Uses other words and texts; those of the paper are entities of CounterFact.

    Limits:
        Does not show that a model knows the word.
    """
    if n < 1 or min_tokens < 2:
        raise UsageError(
            f"n={n}, min_tokens={min_tokens} are too small; ask for one prompt or more, with words of 2 tokens or more."
        )
    known = _words()
    long = [word for word in known if len(_placed(tokenizer, word)) >= min_tokens]
    if len(long) < 4:
        raise PromptError(
            f"{len(long)} of {len(known)} words have {min_tokens} tokens or more for this tokenizer; ask for fewer."
        )
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    pool = sorted(set(tokenizer.get_vocab().values()) - special)
    items = []
    for i in range(n):
        rng = Random(f"entities/{seed}/{i}")
        word, frame = rng.choice(long), rng.choice(FRAMES)
        before, after = frame.split(" {entity}")
        before = f"{next(haystack.paragraphs(f'entities/{seed}/{i}'))[0]} {before}"
        span = (len(before) + 1, len(before) + 1 + len(word))
        meta = {"id": f"entities/{seed}/{i}", "entity": word, "random": random}
        items.append({"text": f"{before} {word}{after}\n{before}", "spans": {"entity": span}, "meta": meta})
    prompts = Prompts.encode(tokenizer, items)
    return replace(prompts, items=tuple(_mixed(prompt, pool) for prompt in prompts)) if random else prompts


def _words() -> list[str]:
    """The words of this project's lists, without the invented names and towns."""
    facts = [text.split() for key, text in needle.grammar()["lists"].items() if key not in INVENTED]
    pairs = [pair for relation in data("relations.json").values() for pair in relation]
    every = [word for words in (*facts, *pairs, *haystack.grammar()[0].values()) for word in words]
    return [word for word in dict.fromkeys(every) if word.isalpha()]


def _mixed(prompt: Prompt, pool: list[int]) -> Prompt:
    """The prompt with random tokens in place of its word."""
    start, stop = prompt.spans["entity"][0]
    drawn = sample(pool, stop - start, Random(f"random/{prompt.meta['id']}"))
    return replace(prompt, text="", ids=(*prompt.ids[:start], *drawn, *prompt.ids[stop:]))


def _placed(tokenizer: Any, word: str) -> list[int]:
    """Tokens of a word that follows another one."""
    both = tokenizer(f"the {word}", add_special_tokens=False)["input_ids"]
    return both[len(tokenizer("the", add_special_tokens=False)["input_ids"]) :]
