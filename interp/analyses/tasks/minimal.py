"""Minimal pairs: prompts of equal length that differ in one word, and words that are one token."""

from collections.abc import Iterable, Sequence
from string import Formatter
from typing import Any

from interp.errors import PromptError
from interp.hooks.prompts.prompts import Prompts

Places = dict[str, tuple[int, int]]
"""slot to the characters that fill it"""


def render(template: str, **slots: str) -> tuple[str, Places]:
    """The filled template, and where each slot ended up."""
    text, places = "", {}
    for before, name, *_ in Formatter().parse(template):
        text += before
        if name:
            places[name] = (len(text), len(text) + len(slots[name]))
            text += slots[name]
    return text, places


def single(tokenizer: Any, words: Iterable[str], least: int) -> list[str]:
    """The words that are one token when they follow a space. PromptError for fewer than `least`."""
    start = "This is"
    before = tokenizer(start, add_special_tokens=False)["input_ids"]
    every = list(words)
    found = []
    for word in every:
        # in place, since some tokenizers put a space before a text that stands alone
        both = tokenizer(f"{start} {word}", add_special_tokens=False)["input_ids"]
        if both[: len(before)] == before and len(both) == len(before) + 1 and both[-1] != tokenizer.unk_token_id:
            found.append(word)
    if len(found) < least:
        raise PromptError(
            f"{len(found)} of {len(every)} words ({every[0]}, {every[1]}, ...) are single tokens for this tokenizer "
            f"and {least} are needed for pairs of equal length: write pairs of your own."
        )
    return found


def encoded(tokenizer: Any, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[Prompts, Prompts]:
    """Both sides of the pairs as Prompts. PromptError where a pair comes out in different lengths."""
    clean, corrupt = (Prompts.encode(tokenizer, side) for side in zip(*pairs, strict=True))
    for number, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        if len(one) != len(other):
            raise PromptError(
                f"pair {number} has {len(one)} and {len(other)} tokens, though it differs in one single-token word: "
                "this tokenizer joins words, so write pairs of your own."
            )
    return clean, corrupt
