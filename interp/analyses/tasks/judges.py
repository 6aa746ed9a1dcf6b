"""Verdicts on a reply: does it hold, begin with or first name one of the texts that are right for its prompt."""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from interp.hooks.prompts.prompts import Prompt

LETTER = re.compile(r"(?<![\w'’])[A-Z](?![\w'’])")


def contains(reply: str, prompt: Prompt) -> bool:
    """Whether one of meta["right"] is in the reply, in whole words; case and punctuation do not count.

    Cannot show: that the reply means it; "not Rome" and "Rome or Paris" hold Rome.
    """
    said = split(reply)
    return any(place(said, split(text)) is not None for text in prompt.meta["right"])


def starts(reply: str, prompt: Prompt) -> bool:
    """Whether the reply begins with one of meta["right"], in whole words; case and punctuation do not count."""
    said = split(reply)
    return any(place(said, split(text)) == 0 for text in prompt.meta["right"])


def first(reply: str, prompt: Prompt) -> bool:
    """Whether, of all texts of meta["right"] and meta["wrong"], a right one is the first that the reply names.

    Whole words; case and punctuation do not count. Of texts that begin at one word the longest counts, so that "New
    York City" is not taken for "New York". Cannot show: a denial; "not Paris" names Paris.
    """
    said = split(reply)
    found = []
    for verdict in (True, False):
        for text in prompt.meta["right" if verdict else "wrong"]:
            wanted = split(text)
            at = place(said, wanted)
            if at is not None:
                found.append((at, -len(wanted), verdict))
    # a text that is right and wrong at once sorts as wrong
    return bool(found) and min(found)[2]


def letter(reply: str, prompt: Prompt) -> bool:
    """Whether the first capital that stands alone, among the letters of meta["right"] and meta["wrong"], is right.

    Cannot show: the choice of a reply that begins with an article, "A good question"; begin the reply with a prefix.
    """
    right, wrong = ({text.strip() for text in prompt.meta[key]} for key in ("right", "wrong"))
    chosen = (match[0] for match in LETTER.finditer(unicodedata.normalize("NFKC", reply)))
    return next((mark in right for mark in chosen if mark in right | wrong), False)


def valid_json(reply: str, prompt: Prompt) -> bool:
    """Whether some {...} of the reply parses as JSON; the prompt's right texts are not looked at."""
    return any(True for _ in objects(reply))


def objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object that begins somewhere in the text, inner ones too, in the order of their first braces."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        # a reply of a thousand braces is deeper than the parser goes
        except (ValueError, RecursionError):
            continue
        yield found


def split(text: str) -> list[str]:
    """Words in lower case, cut at apostrophes and all other punctuation."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def place(said: Sequence[str], wanted: Sequence[str]) -> int | None:
    """The first index at which the words `wanted` stand in `said`, one after the other; None where they do not."""
    width = len(wanted)
    starts = range(len(said) - width + 1) if width else ()
    return next((i for i in starts if said[i : i + width] == wanted), None)


JUDGES = {"contains": contains, "starts": starts, "first": first, "letter": letter, "json": valid_json}
"""The judges that a JSONL file can name."""
