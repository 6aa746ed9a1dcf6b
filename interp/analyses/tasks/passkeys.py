"""Passkeys in a haystack: sequences of words hidden in a long text, with all questions and answers at its end."""

from bisect import bisect_right
from functools import cache
from random import Random
from typing import Any

from interp.analyses.tasks.needle import compose, supply
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompt, Prompts

ALPHABET = (
    "anchor basket candle dragon ember feather garden hammer island jacket kettle lantern marble needle orchard pepper "
    "quartz ribbon silver timber umber velvet window xenon yellow zephyr"
)
"""a word for each letter, as one would spell"""
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
)
GRID = 1000
"""number of depths to draw from, between 0.05 and 0.95 of the text"""


def passkeys(
    tokenizer: Any,
    *,
    n: int = 8,
    lengths: tuple[int, ...] = (512,),
    keys: int = 10,
    words: int = 8,
    seed: int = 0,
    shuffled: bool = False,
) -> Prompts:
    """Make `n` prompts of a long text with hidden passkeys, whose questions and answers follow at the end.

    Spans: "context", "passkey" (in the text), "tail" (all questions and answers, on which a loss is taken), "reply"
    (the answers alone). Meta: keys, words, length (as given), shuffled.

    Args:
        tokenizer: The tokenizer of the model.
        n: Number of prompts.
        lengths: Numbers of tokens of the whole prompt, in turn; the text is cut at the last sentence that fits.
        keys: Number of passkeys in a text, "The second passkey is ...", at sorted depths drawn from 0.05 to 0.95.
        words: Number of words of a passkey, drawn from an alphabet of 26.
        seed: Seed from which all prompts are drawn; prompt i depends on the seed and on i, not on the number.
        shuffled: Make the control, in which the answers are other draws than those in the text, so that nothing can be
            looked up.

    Returns:
        Prompts: The prompts.

    Raises:
        UsageError: If a size is below 1, there are more than 20 keys, or a length cannot hold the passkeys and a
            sentence.

    Source:
        DuoAttention, Xiao et al. 2410.10819: 10 keys of 32 words in 1,000 to 32,000 tokens of books.

    Differs:
        Uses other texts and another alphabet. Sentences stay whole, and there is no padding to a multiple of 16 and no
        stray chat token.

    Limits:
        Does not show retrieval by meaning; a passkey can be answered by copying what followed its name.
    """
    if n < 1 or words < 1 or not 1 <= keys <= len(ORDINALS.split()) or not lengths or min(lengths) < 1:
        raise UsageError(
            f"n={n}, lengths={lengths}, keys={keys}, words={words} are out of range; give sizes of at least 1, "
            f"and at most {len(ORDINALS.split())} keys."
        )
    items = [_item(tokenizer, lengths[i % len(lengths)], keys, words, f"{seed}/{i}", shuffled) for i in range(n)]
    return Prompts.encode(tokenizer, items)


def _item(tokenizer: Any, length: int, keys: int, words: int, seed: str, shuffled: bool) -> dict[str, Any]:
    """The longest prompt of at most `length` tokens, as an item for Prompts.encode."""
    rng = Random(f"passkeys/{seed}")
    drawn = [[" ".join(rng.choices(ALPHABET.split(), k=words)) for _ in range(keys)] for _ in range(2)]
    depths = sorted(0.05 + 0.9 * step / (GRID - 1) for step in rng.sample(range(GRID), keys))
    facts = [_sentence(i, key) for i, key in enumerate(drawn[0])]
    sentences, ends = supply(tokenizer, length, f"passkeys/{seed}")

    def render(count: int) -> dict[str, Any]:
        text, ranges = compose(sentences[:count], list(zip(depths, facts, strict=True)))
        spans: dict[str, Any] = {"context": (0, len(text)), "passkey": ranges}
        tail, replies = len(text) + 2, []
        text += "\n\n"
        for i, key in enumerate(drawn[1 if shuffled else 0]):
            text += f"What is the {ORDINALS.split()[i]} passkey? {_sentence(i, key)}\n\n"
            end = len(text) - 3
            replies.append((end - len(key), end))
        spans |= {"tail": (tail, len(text)), "reply": replies}
        meta = {"keys": keys, "words": words, "length": length, "shuffled": shuffled}
        return {"text": text, "spans": spans, "meta": meta}

    @cache
    def tokens(count: int) -> int:
        return len(encoded(count).ids)

    def encoded(count: int) -> Prompt:
        return Prompts.encode(tokenizer, [{"text": render(count)["text"]}])[0]

    # the sizes of the sentences give a first estimate; counting whole prompts decides
    fitting = max(1, bisect_right(ends, length - tokens(1) + ends[0]))
    while fitting and tokens(fitting) > length:
        fitting -= 1
    while fitting and fitting < len(ends) and tokens(fitting + 1) <= length:
        fitting += 1
    if not fitting:
        raise UsageError(
            f"length {length} is too short; {keys} passkeys of {words} words and one sentence take {tokens(1)} tokens."
        )
    return render(fitting)


def _sentence(number: int, key: str) -> str:
    """The sentence that states a passkey."""
    return f"The {ORDINALS.split()[number]} passkey is {key}."
