"""Minimal pairs: prompts of equal length that differ in one word, and words that are one token."""

from collections.abc import Iterable, Sequence
from string import Formatter
from typing import Any

from interp.errors import PromptError
from interp.hooks.prompts.prompts import Prompts

Places = dict[str, tuple[int, int]]
"""slot -> range of the characters that fill it"""


def render(template: str, **slots: str) -> tuple[str, Places]:
    """The filled template, and the place of each slot."""
    text, places = "", {}
    for before, name, *_ in Formatter().parse(template):
        text += before
        if name:
            places[name] = (len(text), len(text) + len(slots[name]))
            text += slots[name]
    return text, places


def single(tokenizer: Any, words: Iterable[str], min_count: int) -> list[str]:
    """The words that are single tokens when they follow a space.

    Args:
        tokenizer: The tokenizer of the model.
        words: Words to choose from.
        min_count: Number of words that are needed.

    Returns:
        list: The words, in the given order.

    Raises:
        PromptError: If fewer than `min_count` words are single tokens.
    """
    start = "This is"
    before = tokenizer(start, add_special_tokens=False)["input_ids"]
    every = list(words)
    found = []
    for word in every:
        # after other words, since some tokenizers put a space before a text
        both = tokenizer(f"{start} {word}", add_special_tokens=False)["input_ids"]
        if both[: len(before)] == before and len(both) == len(before) + 1 and both[-1] != tokenizer.unk_token_id:
            found.append(word)
    if len(found) < min_count:
        raise PromptError(
            f"{len(found)} of {len(every)} words ({every[0]}, {every[1]}, ...) are single tokens for this tokenizer "
            f"and {min_count} are needed for pairs of equal length; use another tokenizer, or other pairs."
        )
    return found


def encoded(tokenizer: Any, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[Prompts, Prompts]:
    """Both sides of the pairs as Prompts.

    Raises:
        PromptError: If the prompts of a pair differ in length.
    """
    clean, corrupt = (Prompts.encode(tokenizer, side) for side in zip(*pairs, strict=True))
    for number, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        if len(one) != len(other):
            raise PromptError(
                f"pair {number} has {len(one)} and {len(other)} tokens, though it differs in one single-token word; "
                "use a tokenizer that does not join words, or other pairs."
            )
    return clean, corrupt
