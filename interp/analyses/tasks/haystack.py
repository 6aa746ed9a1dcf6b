"""Plain English prose of any length, written for this project: the text in which needles are hidden."""

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from random import Random
from re import sub

Lists = dict[str, list[str]]
Topic = dict[str, list[str]]


@cache
def grammar() -> tuple[Lists, tuple[Topic, ...]]:
    """The word lists and the topics of haystack.txt; a topic has opening, middle and closing sentences."""
    lists: Lists = {}
    topics: list[Topic] = []
    for line in files("interp.analyses.tasks").joinpath("haystack.txt").read_text("utf-8").splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "=":
            topics.append({">": [], "-": [], "<": []})
        elif mark in (">", "-", "<"):
            topics[-1][mark].append(rest)
        elif mark.endswith(":"):
            lists[mark[:-1]] = [word.strip() for word in rest.split("|")]
    return lists, tuple(topics)


def paragraphs(seed: int | str = 0) -> Iterator[list[str]]:
    """Yield endless paragraphs, each a list of 3 to 6 sentences; the same for a seed on every machine.

    No sentence comes twice as long as new ones are easily found (70k tokens of SmolLM2), and no paragraph ever does.
    The prose is plausible, not informative. It has no proper names and no figures, so no needle is mistaken for it.

    Args:
        seed: Seed of the paragraphs.
    """
    rng = Random(f"haystack/{seed}")
    topics: list[Topic] = []
    seen: set[str] = set()
    while True:
        topics = topics or rng.sample(grammar()[1], len(grammar()[1]))
        sentences = fill(topics.pop(), rng)
        for _ in range(30):
            if seen.isdisjoint(sentences):
                break
            sentences = fill(rng.choice(grammar()[1]), rng)
        if not seen.issuperset(sentences):
            seen.update(sentences)
            yield sentences


def fill(topic: Topic, rng: Random) -> list[str]:
    """One paragraph of a topic with its word slots filled; a slot keeps its word within the paragraph."""
    frames = [rng.choice(topic[">"]), *rng.sample(topic["-"], rng.randint(2, 4))]
    if rng.random() < 0.7:
        frames.append(rng.choice(topic["<"]))
    words: dict[str, str] = {}
    for name, options in grammar()[0].items():
        words[name], words[name + "2"] = rng.sample(options, 2)
    return [sub(r"^\w|(?<=\. )\w", lambda m: m[0].upper(), frame.format_map(words)) for frame in frames]
