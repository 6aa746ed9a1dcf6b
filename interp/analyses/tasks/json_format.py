"""Name and occupation from a biography, as JSON."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from interp.analyses.tasks.judges import objects, place, split
from interp.analyses.tasks.task import Task, data
from interp.hooks.prompts.prompts import Prompt

COPIES = 3


def items() -> Iterator[dict[str, Any]]:
    """Three biographies for each occupation in bios.json, each of another person."""
    lists = data("bios.json")
    jobs = list(lists["job"])
    for i, (job, does) in enumerate([pair for pair in lists["job"].items() for _ in range(COPIES)]):
        rng = Random(f"json/{i}")
        she = "she" if i % 2 else "he"
        # the two lists of names differ in length, so that no person comes twice
        name = f"{lists[she][i // 2 % len(lists[she])]} {lists['last'][i % len(lists['last'])]}"
        slots = {"name": name, "job": job, "does": does, "a": "an" if job[0] in "aeiou" else "a"}
        slots |= {"s": she, "S": she.title(), "years": rng.choice(["six", "nine", "twelve", "twenty"])}
        slots["town"], slots["town2"] = rng.sample(lists["town"], 2)
        slots["hobby"] = rng.choice(lists["hobby"]).format_map(slots)
        bio = lists["frame"][i % len(lists["frame"])].format_map(slots)
        bio = ". ".join(sentence[0].upper() + sentence[1:] for sentence in bio.split(". "))
        instruction = lists["instruction"][(i + i // 4) % len(lists["instruction"])]
        yield {
            "id": f"json/{i}",
            "messages": [{"role": "user", "content": f"{bio}\n\n{instruction}"}],
            "spans": {"mark": instruction},
            "question": instruction,
            "answer": job,
            "right": [json.dumps({"name": name, "occupation": job}), json.dumps({"occupation": job, "name": name})],
            # the right content in another form, and the right form with another content
            "wrong": [
                f"{name} is {slots['a']} {job}.",
                f"Name: {name}\nOccupation: {job}",
                json.dumps({"name": name, "occupation": jobs[(jobs.index(job) + 7) % len(jobs)]}),
            ],
        }


def judge(reply: str, prompt: Prompt) -> bool:
    """Whether a {...} of the reply is JSON whose "occupation" contains the words of meta["answer"]."""
    values = (value for found in objects(reply) for key, value in found.items() if key.strip().lower() == "occupation")
    wanted = split(prompt.meta["answer"])
    return any(place(split(value), wanted) is not None for value in values if isinstance(value, str))


JSON = Task("json", "name and occupation from a biography, as JSON", judge, 64, None, items)
"""Source: the JSON task of Zhang et al. 2311.02262. Differs: invented people, and the name is not judged."""
