"""A well-known fact that the prompt changes: does the reply follow the prompt, or what the model knows?"""

from collections.abc import Iterator
from typing import Any

from interp.analyses.tasks.judges import first
from interp.analyses.tasks.task import Task, data


def items() -> Iterator[dict[str, Any]]:
    """One item for each pair in facts_changed.json; the new object is that of another pair of the same relation."""
    for relation in data("facts_changed.json"):
        objects = list(dict.fromkeys(relation["pairs"].values()))
        for i, (subject, old) in enumerate(relation["pairs"].items()):
            # each pair takes another step, so that objects are not simply swapped in turn
            new = objects[(objects.index(old) + 1 + i % (len(objects) - 1)) % len(objects)]
            was, now = (relation["fact"].format(s=subject, o=o, was=verb) for o, verb in ((old, "was"), (new, "is")))
            question, prefix = (relation[key].format(s=subject) for key in ("question", "prefix"))
            yield {
                "id": f"counterfact/{relation['relation']}/{subject}",
                "messages": [{"role": "user", "content": f"Previously, {was}. Currently, {now}. {question}"}],
                "prefix": prefix,
                "spans": {"mark": now},
                "question": question,
                "answer": new,
                "right": names(new, relation["relation"]),
                "wrong": names(old, relation["relation"]),
            }


def names(thing: str, relation: str) -> list[str]:
    """Names of a thing; a person with several names is also known by the last one."""
    return list(dict.fromkeys([thing, thing.split()[-1]])) if relation == "author" else [thing]


COUNTERFACT = Task(
    "counterfact",
    "a question answered from an altered fact in the prompt that contradicts what the model knows",
    first,
    16,
    "\n",
    items,
)
"""Source: the CounterFact task of Zhang et al. 2311.02262. Differs: other facts, and generated replies are judged
too."""
