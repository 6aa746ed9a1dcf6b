"""Judges of a reply: whether it contains, begins with or first names one of the right texts of its prompt."""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from interp.hooks.prompts.prompts import Prompt

LETTER = re.compile(r"(?<![\w'’])[A-Z](?![\w'’])")


def contains(reply: str, prompt: Prompt) -> bool:
    """Whether one of meta["right"] is in the reply, in whole words; case and punctuation are ignored.

    Limits:
        Does not show that the reply means it; "not Rome" and "Rome or Paris" both contain Rome.
    """
    words = split(reply)
    return any(place(words, split(text)) is not None for text in prompt.meta["right"])


def starts(reply: str, prompt: Prompt) -> bool:
    """Whether the reply begins with one of meta["right"], in whole words; case and punctuation are ignored."""
    words = split(reply)
    return any(place(words, split(text)) == 0 for text in prompt.meta["right"])


def first(reply: str, prompt: Prompt) -> bool:
    """Whether the first text of meta["right"] and meta["wrong"] that the reply names is a right one.

    Texts count in whole words; case and punctuation are ignored. Of texts that begin at one word the longest counts, so
    that "New York City" is not taken for "New York".

    Limits:
        Does not recognise a denial; "not Paris" names Paris.
    """
    words = split(reply)
    found = []
    for verdict in (True, False):
        for text in prompt.meta["right" if verdict else "wrong"]:
            wanted = split(text)
            at = place(words, wanted)
            if at is not None:
                found.append((at, -len(wanted), verdict))
    # a text that is right and wrong at once sorts as wrong
    return bool(found) and min(found)[2]


def letter(reply: str, prompt: Prompt) -> bool:
    """Whether the first capital letter that is a word, among the letters of meta["right"] and meta["wrong"], is right.

    Limits:
        Does not show the choice of a reply that begins with an article, such as "A good question"; begin the reply with
        a prefix.
    """
    right, wrong = ({text.strip() for text in prompt.meta[key]} for key in ("right", "wrong"))
    chosen = (match[0] for match in LETTER.finditer(unicodedata.normalize("NFKC", reply)))
    return next((mark in right for mark in chosen if mark in right | wrong), False)


def valid_json(reply: str, prompt: Prompt) -> bool:
    """Whether some {...} of the reply parses as JSON; the right texts of the prompt are ignored."""
    return any(True for _ in objects(reply))


def objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield every JSON object that begins somewhere in the text, inner ones too, in the order of their first braces."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        # a reply of a thousand braces is too deep for the parser
        except (ValueError, RecursionError):
            continue
        yield found


def split(text: str) -> list[str]:
    """Words in lower case, cut at apostrophes and all other punctuation."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def place(words: Sequence[str], wanted: Sequence[str]) -> int | None:
    """The first index at which the words `wanted` occur in `words`, one after the other; None where they do not."""
    width = len(wanted)
    starts = range(len(words) - width + 1) if width else ()
    return next((i for i in starts if words[i : i + width] == wanted), None)


JUDGES = {"contains": contains, "starts": starts, "first": first, "letter": letter, "json": valid_json}
"""judges that a JSONL file can name"""
