"""Multiple choice: general-knowledge questions with options A to D."""

from collections.abc import Iterator
from typing import Any

from interp.analyses.tasks.judges import letter
from interp.analyses.tasks.task import Task, data

LETTERS = "ABCD"


def items() -> Iterator[dict[str, Any]]:
    """The questions of choice.json. The right option takes the places A to D in turn, and the others keep their
    order."""
    rows = [(subject, row) for subject, rows in data("choice.json").items() for row in rows]
    for i, (subject, (question, answer, *others)) in enumerate(rows):
        at = i % len(LETTERS)
        options = [*others[:at], answer, *others[at:]]
        # each with the end of its line, where the model has read the whole option; no empty line follows the last one,
        # since Llama 3 and Qwen would join both newlines to one token
        lines = [f"{mark}. {option}\n" for mark, option in zip(LETTERS, options, strict=True)]
        listed = "".join(lines)
        yield {
            "id": f"choice/{i}",
            "messages": [{"role": "user", "content": f"{question}\n{listed}Which letter is the right answer?"}],
            "prefix": "The right answer is",
            "spans": {"mark": f"{question}\n{listed}".rstrip("\n"), "options": lines},
            "question": question,
            "answer": answer,
            "option": at,
            "subject": subject,
            "right": [LETTERS[at]],
            "wrong": [mark for mark in LETTERS if mark != LETTERS[at]],
        }


CHOICE = Task("choice", "general-knowledge questions with options A to D", letter, 8, "\n", items)
"""Source: the multiple-choice tasks of Han et al. 2505.11739. Differs: easy questions written for this project; the
model generates a letter."""
