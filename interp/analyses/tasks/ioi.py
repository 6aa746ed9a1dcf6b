"""Indirect object identification: one of two people does something, and the sentence ends with the other one."""

from random import Random
from typing import Any, Literal

from interp.analyses.tasks.minimal import encoded, render, single
from interp.analyses.tasks.task import following
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts

TEMPLATES = (
    "After the rain, {first} and {second} walked to the {place}, where {again} handed the {thing} to",
    "Last week {first} and {second} waited at the {place}. Before leaving, {again} gave the {thing} to",
    "The bus was late, so {first} and {second} sat down near the {place}, and {again} lent the {thing} to",
    "While {first} and {second} were tidying the {place}, {again} passed the {thing} to",
    "Because {first} and {second} had met before at the {place}, {again} was glad to bring the {thing} to",
    "In the morning {first} and {second} opened the {place}. At noon {again} sold the {thing} to",
    "Nobody else was there when {first} and {second} reached the {place}, so {again} showed the {thing} to",
    "At the end of the party {first} and {second} cleaned the {place}, and then {again} offered the {thing} to",
)
NAMES = (
    "Adam Alan Alice Amy Andrew Anna Ben Brian Carl Chris Claire Daniel David Emily Emma Eric Frank George Grace "
    "Hannah Henry Jack James Jane Jason Julia Kate Kevin Laura Lisa Lucy Mark Martin Mary Michael Nancy Oliver Paul "
    "Peter Rachel Robert Rose Ruth Sam Sarah Simon Susan Thomas Tom Victor William"
)
PLACES = "station harbour library garden bakery museum workshop market"
THINGS = "basket letter ticket lantern blanket camera key map"


def ioi(
    tokenizer: Any, n: int = 32, seed: int = 0, *, corrupt: Literal["swapped", "abc"] = "swapped"
) -> tuple[Prompts, Prompts]:
    """Make `n` pairs (clean, corrupt) of equal token length, in which one name differs.

    Clean: "... A and B ..., B gave the key to", where A is right and B is wrong; the orders "ABBA" and "BABA" (B named
    first) alternate.

    Spans, at the same places in both prompts: "io" (A), "s1" (B), "s2" (the name that differs). Meta: task, id, order,
    right, wrong. Names are single tokens.

    Args:
        tokenizer: The tokenizer of the model.
        n: Number of pairs.
        seed: Seed from which all prompts are drawn; pair i depends on the seed and on i, not on the number.
        corrupt: "swapped" is "..., A gave the key to", which swaps right and wrong. "abc" is "..., C gave the key to"
            with a third name, so that nothing tells A from B; its meta has right and wrong as in the clean prompt.

    Returns:
        tuple: Clean and corrupt Prompts.

    Raises:
        UsageError: If `n` is below 1, or `corrupt` is unknown.
        PromptError: If the tokenizer has fewer than three of the names as single tokens.

    Source:
        Wang et al. 2211.00593.

    Differs:
        Uses other templates, names and objects. One word changes, not all three names.

    Limits:
        Does not show that the model knows who receives; the name that occurs once is right without that.
    """
    if n < 1 or corrupt not in ("swapped", "abc"):
        raise UsageError(
            f"n={n} or corrupt={corrupt!r} is not valid; ask for at least one pair, with corrupt 'swapped' or 'abc'."
        )
    names = single(tokenizer, NAMES.split(), 3)
    pairs = []
    for i in range(n):
        rng = Random(f"ioi/{seed}/{i}")
        a, b, c = rng.sample(names, 3)
        io, s1 = ("second", "first") if i % 2 else ("first", "second")
        template, place, thing = rng.choice(TEMPLATES), rng.choice(PLACES.split()), rng.choice(THINGS.split())
        other = a if corrupt == "swapped" else c
        sides = []
        for again, turned in ((b, False), (other, corrupt == "swapped")):
            text, at = render(template, **{io: a, s1: b}, again=again, place=place, thing=thing)
            right, wrong = (b, a) if turned else (a, b)
            spans = {"io": at[io], "s1": at[s1], "s2": at["again"]}
            ends = {"right": [following(text, right)], "wrong": [following(text, wrong)]}
            meta = {"task": "ioi", "id": f"ioi/{seed}/{i}", "order": "BABA" if i % 2 else "ABBA", **ends}
            sides.append({"text": text, "spans": spans, "meta": meta})
        pairs.append((sides[0], sides[1]))
    return encoded(tokenizer, pairs)
