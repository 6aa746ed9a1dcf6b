"""The needle in a haystack as a task: a fact in the middle of a text, steered by its sentence."""

from collections.abc import Iterator
from random import Random
from typing import Any

from interp.analyses.tasks.needle import Fact, draw, fill, grammar, hide, judge
from interp.analyses.tasks.task import Item, Task

N_ITEMS = 160
SEED = 1000
"""far from the seeds of scores and ablation tests"""
DEPTHS = (0.3, 0.4, 0.5, 0.6, 0.7)
LENGTH = 300


def items() -> Iterator[dict[str, Any]]:
    """The facts without their texts, which only a tokenizer can cut to length."""
    templates = {template["key"]: template for template in grammar()["facts"]}
    for i, (fact,) in enumerate(draw(N_ITEMS, 1, "literal", SEED)):
        rng = Random(f"wrong/{SEED}/{i}")
        others: list[str] = []
        while len(others) < 2:
            other = fill(templates[fact.key], "literal", rng).answer
            if other not in (fact.answer, *others):
                others.append(other)
        yield {
            "id": f"needle/{SEED}/{i}",
            "fact": fact.sentence,
            "depth": DEPTHS[i % len(DEPTHS)],
            "key": fact.key,
            "question": fact.question,
            "answer": fact.answer,
            "prefix": fact.prefix,
            "right": [fact.answer],
            "wrong": others,
        }


def render(item: Item, tokenizer: Any) -> dict[str, Any]:
    """The item hidden in another text, about 300 tokens in all; the span of the needle is also called "mark"."""
    fact = Fact(item["key"], item["fact"], item["answer"], item["question"], item["prefix"])
    size = len(tokenizer(f"{fact.sentence} {fact.question} {fact.prefix}", add_special_tokens=False)["input_ids"])
    chat = getattr(tokenizer, "chat_template", None) is not None
    # a tokenizer of single bytes needs many tokens for the fact alone
    length = max(LENGTH, 6 * size)
    hidden = hide(tokenizer, fact, [(item["depth"], fact)], length, chat, item["id"])
    return {**hidden, "spans": {**hidden["spans"], "mark": hidden["spans"]["needle"]}}


NEEDLE = Task(
    "needle", "a made-up fact in the middle of a text, and a question about it", judge, 24, "\n", items, render=render
)
"""Source: as `needle`. Differs: depths 0.3 to 0.7 only. Limits: does not show a gain on a model that answers all of
them, as the demo model does; there it shows what steering breaks."""
