"""Plain prose of an exact length: the prompts on which sinks and previous-token heads are measured."""

from typing import Any

from interp.analyses.tasks.haystack import paragraphs
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompt, Prompts


def passages(tokenizer: Any, *, n: int = 8, length: int = 256, seed: int = 0) -> Prompts:
    """Make `n` prompts of haystack prose with exactly `length` tokens each, all of different texts.

    A BOS comes first if the tokenizer's own call adds one, and it counts. The last word may be cut between two tokens.
    Meta: length.

    Args:
        tokenizer: The tokenizer of the model.
        n: Number of prompts.
        length: Number of tokens of each prompt.
        seed: Seed from which all prompts are drawn; passage i depends on the seed and on i, not on the number.

    Returns:
        Prompts: The prompts.

    Raises:
        UsageError: If a size is below 1.

    Examples:
        >>> interp.tasks.passages(tokenizer, n=2, length=30).lengths
        (30, 30)

    Limits:
        Does not show behaviour on text like that of the model's training; the prose comes from a grammar (haystack.py).
    """
    if n < 1 or length < 1:
        raise UsageError(f"n={n}, length={length} are too small; each has to be at least 1.")
    items = []
    for i in range(n):
        source = paragraphs(f"passages/{seed}/{i}")
        text, ids, ends = "", [], []
        # one token more than needed, so that an end-of-text token is never among those kept
        while len(ids) <= length:
            for _ in range(1 + length // 80):
                text += " ".join(next(source)) + "\n\n"
            encoded = tokenizer(text, return_offsets_mapping=True)
            ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
        kept = text[: max(ends[:length])]
        items.append(Prompt(text=kept, ids=tuple(ids[:length]), spans={}, meta={"length": length}))
    pad = getattr(tokenizer, "pad_token_id", None)
    return Prompts(items=tuple(items), tokenizer=tokenizer, pad_id=0 if pad is None else pad)
