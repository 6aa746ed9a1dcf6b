"""One question after several contexts, one of which answers it."""

from random import Random
from typing import Any

from interp.analyses.tasks.needle import draw, hide
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts


def contexts(
    tokenizer: Any,
    *,
    questions: int = 4,
    each: int = 4,
    length: int = 200,
    depth: float = 0.5,
    chat: bool | None = None,
    seed: int = 0,
) -> Prompts:
    """`each` prompts for each of `questions` questions, which differ in their context; one context has the answer.

    All are prompts of tasks.needle of at most `length` tokens, the needle at `depth` in one of them and in no other;
    questions come one after another. Spans: "context", "question", and in the one that answers "needle" and "answer".
    meta: id, group (the question's), slot (the context's), gold (whether it answers), answer, key, question, prefix.
    The prompts of question i depend on seed and i, not on their number.
    Raises UsageError for less than 1 question or 2 contexts, and a length that cannot hold needle and one sentence.
    Source: ours, after the set-up of Wu et al. 2404.15574. Cannot show: contexts that mislead; the others are silent.
    """
    if questions < 1 or each < 2 or not 0 <= depth <= 1:
        raise UsageError(
            f"questions={questions}, each={each}, depth={depth}: ask for a question or more, with 2 contexts or more, "
            "and a depth between 0 and 1."
        )
    if chat is None:
        chat = getattr(tokenizer, "chat_template", None) is not None
    items = []
    for i, (fact,) in enumerate(draw(questions, 1, "literal", seed)):
        gold = Random(f"contexts/{seed}/{i}").randrange(each)
        for slot in range(each):
            placed = [(depth, fact)] if slot == gold else []
            item = hide(tokenizer, fact, placed, length, chat, f"contexts/{seed}/{i}/{slot}")
            item["meta"] = {
                "id": f"{seed}/{i}/{slot}",
                "group": f"{seed}/{i}",
                "slot": slot,
                "gold": slot == gold,
                "answer": fact.answer,
                "key": fact.key,
                "question": fact.question,
                "prefix": fact.prefix,
            }
            items.append(item)
    return Prompts.encode(tokenizer, items, chat=chat, continue_final=chat)
