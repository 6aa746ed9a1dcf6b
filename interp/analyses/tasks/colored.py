"""Coloured objects: a list of things with a different colour each, and a question about the colour of one of them."""

from random import Random
from typing import Any

from interp.analyses.tasks.minimal import encoded, render, single
from interp.analyses.tasks.task import following
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts

LIST = "a {colour0} {object0}, a {colour1} {object1} and a {colour2} {object2}"
TEMPLATES = (
    f"On the shelf there is {LIST}. The colour of the {{asked}} is",
    f"In the picture I can see {LIST}. What is the colour of the {{asked}}? It is",
    f"Somebody left {LIST} on the bench. The {{asked}} is",
    f"There is {LIST} in the window. The colour of the {{asked}} in the window is",
)
COLOURS = "red blue green yellow black white brown pink purple grey silver gold"
OBJECTS = (
    "cup book lamp box pen plate bottle bag ball chair coat hat key ring phone spoon knife clock ticket basket bowl "
    "candle brush shirt mirror blanket pillow towel jacket button rope drum flag mask pot"
)


def colored_objects(tokenizer: Any, n: int = 32, seed: int = 0) -> tuple[Prompts, Prompts]:
    """Make `n` pairs (clean, corrupt) of equal length: three coloured things, and a question about one of them.

    Clean: "... a red cup, a blue hat and a green key. The colour of the hat is", where blue is right. The corrupt
    prompt asks for another of the three things; its colour is right there and wrong in the clean prompt, and the
    reverse.

    Spans, at the same places in both prompts: "colour" and "object" (in the list, of the thing that the clean prompt
    asks for), "other_colour" and "other_object" (of the thing that the corrupt prompt asks for), `asked` (the word that
    differs). Meta: task, id, right, wrong. Colours and objects are single tokens.

    Args:
        tokenizer: The tokenizer of the model.
        n: Number of pairs.
        seed: Seed from which all prompts are drawn; pair i depends on the seed and on i, not on the number.

    Returns:
        tuple: Clean and corrupt Prompts.

    Raises:
        UsageError: If `n` is below 1.
        PromptError: If the tokenizer has fewer than three colours or objects as single tokens.

    Source:
        The coloured objects of BIG-bench, used as a pair of tasks with IOI in Merullo et al. 2310.08744.

    Differs:
        Uses other wordings and things, no example in the prompt, and always three things.

    Limits:
        Does not show what happens with more things, or where the colour is not named next to its thing.
    """
    if n < 1:
        raise UsageError(f"n={n} is too small; ask for at least one pair.")
    colours, objects = (single(tokenizer, words.split(), 3) for words in (COLOURS, OBJECTS))
    pairs = []
    for i in range(n):
        rng = Random(f"colored/{seed}/{i}")
        hues, things, places = rng.sample(colours, 3), rng.sample(objects, 3), rng.sample(range(3), 2)
        slots = {f"colour{j}": hue for j, hue in enumerate(hues)} | {
            f"object{j}": thing for j, thing in enumerate(things)
        }
        template = rng.choice(TEMPLATES)
        sides = []
        for this, other in (places, places[::-1]):
            text, at = render(template, asked=things[this], **slots)
            spans = {"asked": at["asked"]}
            for name, place in zip(("", "other_"), places, strict=True):
                spans |= {f"{name}colour": at[f"colour{place}"], f"{name}object": at[f"object{place}"]}
            ends = {"right": [following(text, hues[this])], "wrong": [following(text, hues[other])]}
            meta = {"task": "colored_objects", "id": f"colored/{seed}/{i}", **ends}
            sides.append({"text": text, "spans": spans, "meta": meta})
        pairs.append((sides[0], sides[1]))
    return encoded(tokenizer, pairs)
