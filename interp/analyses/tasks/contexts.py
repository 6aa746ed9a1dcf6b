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
    """Make `each` prompts for each of `questions` questions: contexts of which one holds the answer.

    All are prompts of `tasks.needle` of at most `length` tokens, with the needle in one of them and in no other. The
    questions come one after another.

    Spans: "context", "question", and in the prompt that answers "needle" and "answer". Meta: id, group (of the
    question), slot (of the context), gold (whether it answers), answer, key, question, prefix.

    Args:
        tokenizer: The tokenizer of the model.
        questions: Number of questions.
        each: Number of contexts of each question.
        length: Largest number of tokens of a prompt.
        depth: Place of the needle, as a fraction of the text.
        chat: Use the tokenizer's chat template; None uses it if there is one.
        seed: Seed from which all prompts are drawn; the prompts of question i depend on the seed and on i.

    Returns:
        Prompts: `questions` times `each` prompts.

    Raises:
        UsageError: If there is no question, fewer than 2 contexts, or the length cannot hold a needle and one sentence.

    Source:
        Our own, after the set-up of Wu et al. 2404.15574.

    Limits:
        Does not show what contexts that mislead would do; the other contexts say nothing about the question.
    """
    if questions < 1 or each < 2 or not 0 <= depth <= 1:
        raise UsageError(
            f"questions={questions}, each={each}, depth={depth} are out of range; ask for at least one question "
            "with at least 2 contexts, and a depth between 0 and 1."
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
