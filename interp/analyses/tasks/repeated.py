"""Repeated random tokens: the prompts on which induction, duplicate-token and previous-token heads are measured."""

from random import Random
from typing import Any

from interp.errors import UsageError
from interp.hooks.model.bos import first_tokens
from interp.hooks.prompts.prompts import Prompts


def repeated(
    vocab: Any,
    *,
    n: int = 50,
    copies: int = 2,
    batch: int = 8,
    bos: int | bool | None = None,
    seed: int = 0,
    shuffled: bool = False,
) -> Prompts:
    """Make `batch` prompts of the ids [BOS?] r_1 ... r_n r_1 ... r_n, with new random r for each prompt.

    Spans: "first", "second", "copy3" and so on. Meta: n, copies, shuffled, bos (whether there is one). In the second
    copy or later, the induction target of the query at position i is position i - n + 1, the token after the earlier
    copy of i; for the last query of the second copy that is the first token of the second copy itself.

    Args:
        vocab: A tokenizer, whose special and added tokens are not drawn. Or the number of ids, which gives 0 ...
            vocab-1 without `bos`.
        n: Number of random tokens. Ids in a copy differ as long as there are enough.
        copies: Number of copies.
        batch: Number of prompts.
        bos: Id of a first token; True for the BOS of the tokenizer, False for no first token. None begins as the
            tokenizer's own call begins a text.
        seed: Seed of the ids; prompt i depends on the seed and on i, not on `batch`.
        shuffled: Make the control, in which every later copy is a new draw, so that nothing in it can be predicted.

    Returns:
        Prompts: The prompts.

    Raises:
        UsageError: If a size is below 1, the vocabulary is empty, or `bos` is True without a BOS token.

    Examples:
        >>> interp.tasks.repeated(tokenizer, n=8, batch=2).lengths
        (16, 16)

    Source:
        Olsson et al. 2022 (2209.11895).

    Differs:
        Uses 2 copies of 50 tokens instead of 4 of 25, and keeps frequent and rare ids.
    """
    if min(n, copies, batch) < 1:
        raise UsageError(f"n={n}, copies={copies}, batch={batch} are too small; each has to be at least 1.")
    tokenizer = None if isinstance(vocab, int) else vocab
    prefix = first(tokenizer, bos)
    if tokenizer is None:
        pool = [i for i in range(vocab) if i not in prefix]
    else:
        special = {*prefix, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        pool = sorted(set(tokenizer.get_vocab().values()) - special)
    if not pool:
        raise UsageError(f"vocab={vocab!r} leaves no ordinary token to draw from; give a tokenizer or a larger number.")
    rows = []
    for i in range(batch):
        rng = Random(f"repeated/{seed}/{i}")
        drawn = sample(pool, n * copies if shuffled else n, rng)
        rows.append(prefix + (drawn if shuffled else drawn * copies))
    names = ["first", "second", *(f"copy{c}" for c in range(3, copies + 1))][:copies]
    spans = {name: [(len(prefix) + c * n, len(prefix) + (c + 1) * n)] for c, name in enumerate(names)}
    meta = {"n": n, "copies": copies, "shuffled": shuffled, "bos": bool(prefix)}
    pad = getattr(tokenizer, "pad_token_id", None)
    return Prompts.from_ids(
        rows, spans=[spans] * batch, meta=[meta] * batch, pad_id=0 if pad is None else pad, tokenizer=tokenizer
    )


def first(tokenizer: Any, bos: int | bool | None) -> list[int]:
    """The tokens before the first copy."""
    if bos is None or bos is False:
        return list(first_tokens(tokenizer)) if bos is None and tokenizer is not None else []
    if bos is not True:
        return [bos]
    known = getattr(tokenizer, "bos_token_id", None)
    if known is None:
        raise UsageError("bos=True was given without a BOS token; give its id, or a tokenizer that has one.")
    return [known]


def sample(pool: list[int], n: int, rng: Random) -> list[int]:
    """n different ids if the pool has as many, else independent draws."""
    return rng.sample(pool, n) if n <= len(pool) else rng.choices(pool, k=n)
