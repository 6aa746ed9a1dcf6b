"""A text that comes twice and stops before a word of several tokens: what a head looks at to write the word."""

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


def entities(tokenizer: Any, *, n: int = 16, least: int = 3, random: bool = False, seed: int = 0) -> Prompts:
    """`n` prompts of a text, a new line, and the same text again up to where one word of it comes.

    The word has at least `least` tokens and is a common word, country or city of our own lists. random: the control.
    The tokens of the word are drawn at random in its place, as many of them; all else is as in the prompt of the same
    number. Span: "entity", the word where it stands. meta: id, entity, random. Prompt i depends on seed and i, not n.
    Raises UsageError for n below 1 and least below 2, PromptError where too few words have so many tokens.
    Source: after Feucht et al. 2504.03022. Differs: own words and texts; theirs are entities of CounterFact.
    Cannot show: that a model knows the word.
    """
    if n < 1 or least < 2:
        raise UsageError(f"n={n}, least={least}: ask for a prompt or more, with words of 2 tokens or more.")
    known = _words()
    long = [word for word in known if len(_placed(tokenizer, word)) >= least]
    if len(long) < 4:
        raise PromptError(
            f"{len(long)} of {len(known)} words have {least} tokens or more for this tokenizer: ask for fewer tokens."
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
    """The words of our own lists, without the names and towns that were made up."""
    facts = [text.split() for key, text in needle.grammar()["lists"].items() if key not in INVENTED]
    pairs = [pair for relation in data("relations.json").values() for pair in relation]
    every = [word for words in (*facts, *pairs, *haystack.grammar()[0].values()) for word in words]
    return [word for word in dict.fromkeys(every) if word.isalpha()]


def _mixed(prompt: Prompt, pool: list[int]) -> Prompt:
    """The prompt with other tokens in the place of its word."""
    start, stop = prompt.spans["entity"][0]
    drawn = sample(pool, stop - start, Random(f"random/{prompt.meta['id']}"))
    return replace(prompt, text="", ids=(*prompt.ids[:start], *drawn, *prompt.ids[stop:]))


def _placed(tokenizer: Any, word: str) -> list[int]:
    """The tokens of a word that follows another one."""
    both = tokenizer(f"the {word}", add_special_tokens=False)["input_ids"]
    return both[len(tokenizer("the", add_special_tokens=False)["input_ids"]) :]
