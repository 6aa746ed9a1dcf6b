"""Texts to classify: the sentiment of reviews, and the topic of news."""

import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from interp.analyses.tasks.judges import first
from interp.analyses.tasks.task import Task, data

SENTIMENTS = ("positive", "negative")
FILLS = 3


def reviews() -> Iterator[dict[str, Any]]:
    """Four reviews of each thing in reviews.json: two of each sentiment, with two sentences and sometimes an aside."""
    lists = data("reviews.json")
    cells = [(kind, thing, label) for kind in lists["kinds"] for thing in kind["things"] for label in SENTIMENTS * 2]
    for i, (kind, thing, label) in enumerate(cells):
        rng = Random(f"reviews/{i}")
        slots = {"thing": thing, "when": rng.choice(lists["when"]), "when2": rng.choice(lists["when2"])}
        parts = [rng.choice(lists["opening"][kind["sort"]]).format_map(slots), *rng.sample(kind[label], 2)]
        if i % 3 == 0:
            parts.insert(1, rng.choice(lists["aside"][kind["sort"]]))
        ask = "Is this review positive or negative?"
        text = " ".join(parts)
        yield labelled(f"sentiment/{i}", text, ask, f"{text}\n\n{ask}", "This review is", label, SENTIMENTS)


def news() -> Iterator[dict[str, Any]]:
    """Three sentences for each frame in headlines.json, whose alternatives {a/b/c} are filled in turn."""
    topics = tuple(data("headlines.json"))
    for label, frames in data("headlines.json").items():
        for i, (frame, fill) in enumerate([(frame, k) for frame in frames for k in range(FILLS)]):
            text = re.sub(r"\{([^}]*)\}", lambda m, fill=fill: m[1].split("/")[fill], frame)
            ask = f"Choose the topic of the text: {', '.join(topics[:-1])} or {topics[-1]}."
            # with the question after the text, a small model repeats the list of topics
            chat = f"{ask}\n\nText: {text}"
            yield labelled(f"topic/{label}/{i}", text, ask, chat, "The topic is", label, topics)


def labelled(id: str, text: str, ask: str, chat: str, prefix: str, label: str, labels: Sequence[str]) -> dict[str, Any]:
    """An item of a text and its label."""
    return {
        "id": id,
        "messages": [{"role": "user", "content": chat}],
        "prefix": prefix,
        "spans": {"mark": text},
        "question": ask,
        "answer": label,
        "right": [label],
        "wrong": [other for other in labels if other != label],
    }


SENTIMENT = Task("sentiment", "reviews of everyday things: positive or negative", first, 8, "\n", reviews)
"""Source: the classification tasks of Han et al. 2505.11739. Differs: other reviews; the model generates the label."""
TOPIC = Task("topic", "news: sports, business, science or politics", first, 8, "\n", news)
"""Source: as `SENTIMENT`."""
