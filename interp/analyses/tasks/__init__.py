"""Prompts with known answers, judges of replies, and the tasks on which steering is measured."""

from interp.analyses.tasks import refusal
from interp.analyses.tasks.choice import CHOICE
from interp.analyses.tasks.classify import SENTIMENT, TOPIC
from interp.analyses.tasks.colored import colored_objects
from interp.analyses.tasks.contexts import contexts
from interp.analyses.tasks.counterfact import COUNTERFACT
from interp.analyses.tasks.documents import documents
from interp.analyses.tasks.entities import entities
from interp.analyses.tasks.injection import injection
from interp.analyses.tasks.ioi import ioi
from interp.analyses.tasks.json_format import JSON
from interp.analyses.tasks.needle import judge, needle, rouge1_recall
from interp.analyses.tasks.needles import NEEDLE
from interp.analyses.tasks.passages import passages
from interp.analyses.tasks.passkeys import passkeys
from interp.analyses.tasks.pronoun import PRONOUN
from interp.analyses.tasks.refused import refused
from interp.analyses.tasks.relations import relations
from interp.analyses.tasks.repeated import repeated
from interp.analyses.tasks.task import Task
from interp.errors import UsageError

__all__ = [
    "Task",
    "colored_objects",
    "contexts",
    "documents",
    "entities",
    "get",
    "injection",
    "ioi",
    "judge",
    "names",
    "needle",
    "passages",
    "passkeys",
    "refusal",
    "refused",
    "relations",
    "repeated",
    "rouge1_recall",
]

_TASKS = {task.name: task for task in (JSON, PRONOUN, COUNTERFACT, SENTIMENT, TOPIC, CHOICE, NEEDLE)}


def names() -> tuple[str, ...]:
    """Names of the tasks that `get` knows."""
    return tuple(_TASKS)


def get(name: str) -> Task:
    """Get a task by its name, or from a JSONL file.

    Args:
        name: One of `names()`, or the path of a file that ends in .jsonl (see `Task.from_jsonl`).

    Returns:
        Task: The task.

    Raises:
        UsageError: If the name is unknown.
        PromptError: If the file cannot be used.

    Examples:
        >>> interp.tasks.get("choice").span
        'mark'
    """
    if name.endswith(".jsonl"):
        return Task.from_jsonl(name)
    if name not in _TASKS:
        raise UsageError(f"unknown task {name!r}; choose from {', '.join(_TASKS)}, or give a file that ends in .jsonl.")
    return _TASKS[name]
