"""A sentence rewritten with "they" in place of "she" or "he"."""

import re
from collections.abc import Iterator
from typing import Any

from interp.analyses.tasks.judges import split
from interp.analyses.tasks.task import Task, data
from interp.hooks.prompts.prompts import Prompt

FORMS = {
    "she": {"s": "she", "S": "She", "o": "her", "p": "her", "r": "herself", "h": "hers"},
    "he": {"s": "he", "S": "He", "o": "him", "p": "his", "r": "himself", "h": "his"},
    "they": {"s": "they", "S": "They", "o": "them", "p": "their", "r": "themselves", "h": "theirs"},
}
GENDERED = frozenset(["she", "he", "her", "his", "him", "hers", "himself", "herself"])
NEUTRAL = frozenset(["they", "them", "their", "theirs", "themselves", "themself"])
FILLS = 4


def items() -> Iterator[dict[str, Any]]:
    """Four sentences for each frame in sentences.json; <a/b/c/d> is filled in turn, and [works|work] agrees with she or
    they."""
    lists = data("sentences.json")
    for i, (frame, fill) in enumerate([(frame, k) for frame in lists["frame"] for k in range(FILLS)]):
        # she and he alternate, and neither is tied to one fill
        who = ("she", "he")[(i + i // FILLS) % 2]
        old, new = spoken(frame, fill, who), spoken(frame, fill, "they")
        instruction = lists["instruction"][(i + i // 4) % len(lists["instruction"])]
        yield {
            "id": f"pronoun/{i}",
            "messages": [{"role": "user", "content": f"{old}\n\n{instruction}"}],
            "prefix": "Rewritten sentence:",
            "spans": {"mark": instruction},
            "question": instruction,
            "answer": new,
            "right": [new],
            "wrong": [old],
        }


def spoken(frame: str, fill: int, who: str) -> str:
    """The sentence of a frame with one of its fills and the pronouns of `who`."""
    text = re.sub(r"<([^>]*)>", lambda m: m[1].split("/")[fill], frame)
    text = re.sub(r"\[([^|]*)\|([^]]*)\]", lambda m: m[2 if who == "they" else 1], text)
    return text.format_map(FORMS[who])


def judge(reply: str, prompt: Prompt) -> bool:
    """Whether the reply has no gendered pronoun and a content word of meta["answer"], which has five letters or more.

    Limits:
        Does not show that the sentence is kept; a reply that leaves the person out passes as well.
    """
    words = set(split(reply))
    content = {word for word in split(prompt.meta["answer"]) if len(word) > 4} - NEUTRAL
    return not words & GENDERED and not words.isdisjoint(content)


PRONOUN = Task("pronoun", 'a sentence rewritten with "they" in place of "she" or "he"', judge, 48, "\n", items)
"""Source: the pronoun task of Zhang et al. 2311.02262 (all pronouns changed). Differs: an empty reply is wrong."""
