"""Random tokens, repeated: the input on which induction, duplicate-token and previous-token heads are measured."""

from random import Random
from typing import Any

from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts


def repeated(
    vocab: Any,
    *,
    n: int = 50,
    copies: int = 2,
    batch: int = 8,
    bos: int | None = None,
    seed: int = 0,
    shuffled: bool = False,
) -> Prompts:
    """`batch` prompts of the ids [BOS?] r_1..r_n r_1..r_n (as many copies as asked for), r drawn anew for each prompt.

    vocab: a tokenizer (special and added tokens are not drawn; its BOS, if it has one, comes first) or the number of
    ids (0..vocab-1 without `bos`, which comes first when given). Ids in a copy differ as long as there are enough.
    shuffled: the control. Every later copy is a draw of its own, so nothing in it can be predicted.
    Spans: "first", "second", "copy3" and so on; meta: n, copies, shuffled, bos (whether there is one).
    In copy two or later, the induction target of the row at position i is position i - n + 1, the token after the
    earlier copy of i; for the last row of the second copy that is the second copy's own first token.
    Prompt i depends on seed and i, not on `batch`. Raises UsageError for sizes below 1 and an empty vocabulary.
    Source: Olsson et al. 2022 (2209.11895). Differs: 2 copies of 50 instead of 4 of 25, frequent and rare ids are kept.
    """
    if min(n, copies, batch) < 1:
        raise UsageError(f"n={n}, copies={copies}, batch={batch}: each has to be at least 1.")
    tokenizer = None if isinstance(vocab, int) else vocab
    if tokenizer is None:
        pool = [i for i in range(vocab) if i != bos]
    else:
        if bos is None:
            bos = tokenizer.bos_token_id
        special = {bos, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        pool = sorted(set(tokenizer.get_vocab().values()) - special)
    if not pool:
        raise UsageError(f"vocab={vocab!r} leaves no ordinary token to draw from: give a tokenizer or a larger number.")
    prefix = [] if bos is None else [bos]
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


def sample(pool: list[int], n: int, rng: Random) -> list[int]:
    """n ids, different ones if the pool has as many, else independent draws."""
    return rng.sample(pool, n) if n <= len(pool) else rng.choices(pool, k=n)
