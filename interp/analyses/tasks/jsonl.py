"""Items of a task from a JSONL file, checked line by line."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp.analyses.tasks.judges import JUDGES
from interp.errors import PromptError, SpanError
from interp.hooks.limits import parse_json, read_text
from interp.hooks.prompts.spans import locate

RESERVED = ("task", "split")
"""entries that the task sets itself"""


def read(path: Path) -> list[dict[str, Any]]:
    """Read the items of a file; ids are added where a line has none, and blank lines are skipped.

    Args:
        path: A UTF-8 file with one JSON object in each line.

    Returns:
        list: The items.

    Raises:
        PromptError: With the file and the line, if the file is not UTF-8 or not JSON, an entry is missing or of the
            wrong type, a span is not in the text, a judge is unknown, or an id comes twice.
    """
    # not splitlines, which would also break a text at its line separators (U+2028)
    lines = read_text(path, PromptError).split("\n")
    items: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item = checked(line, f"line {number} of {path}")
        first = seen.setdefault(item["id"], number)
        if first != number:
            raise PromptError(
                f'line {number} of {path} has the id "{item["id"]}" of line {first}; give each line a different id.'
            )
        items.append(item)
    if not items:
        raise PromptError(f"{path} holds no items; write one JSON object in each line.")
    return items


def checked(line: str, where: str) -> dict[str, Any]:
    """One line as an item; `where` names the line in errors."""
    try:
        item = parse_json(line)
        # half of an escaped surrogate pair is valid JSON, but no text for a tokenizer
        json.dumps(item, ensure_ascii=False).encode()
    except ValueError as error:
        raise PromptError(f"{where} is not JSON in UTF-8 ({error}); write one object in each line.") from error
    if not isinstance(item, dict) or ("text" in item) == ("messages" in item):
        raise PromptError(f'{where} has no prompt; write an object with either "text" or "messages".')
    if reserved := [key for key in RESERVED if key in item]:
        raise PromptError(f'{where} has the entry "{reserved[0]}", which the task sets itself; give it another name.')
    for key in ("right", "wrong"):
        texts = item.get(key)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise PromptError(f'{where}: "{key}" is {texts!r}; give a list of at least one text that can follow.')
    if not isinstance(item.get("prefix", ""), str):
        raise PromptError(f'{where}: "prefix" is {item["prefix"]!r}; give the text with which the reply begins.')
    if "judge" in item and item["judge"] not in (known := list(JUDGES)):
        raise PromptError(f'{where}: "judge" is {item["judge"]!r}; use one of {", ".join(known)}.')
    if "id" in item and not (isinstance(item["id"], str) and item["id"]):
        raise PromptError(f'{where}: "id" is {item["id"]!r}; give a text, or leave it out.')
    check_spans(item, body(item, where), where)
    digest = hashlib.sha256(line.strip().encode()).hexdigest()[:12]
    return {"id": digest, **item}


def body(item: Mapping[str, Any], where: str) -> str:
    """The text of an item, or that of its messages, which its spans refer to."""
    if "text" in item:
        if not isinstance(item["text"], str) or not item["text"]:
            raise PromptError(f'{where}: "text" is {item["text"]!r}; give a text of at least one character.')
        return item["text"]
    turns = item["messages"]
    good = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) and isinstance(turn.get("role"), str)
        for turn in turns
    )
    if not good or not turns:
        raise PromptError(f'{where}: "messages" is {turns!r}; give a list of {{"role": ..., "content": ...}}.')
    if item.get("prefix") and turns[-1]["role"] == "assistant":
        raise PromptError(f"{where} has a prefix and a last assistant message; both begin the reply, so give one.")
    return "\n\n".join(turn["content"] for turn in turns)


def check_spans(item: Mapping[str, Any], text: str, where: str) -> None:
    """Raise PromptError where a span of an item is not in its text."""
    spans = item.get("spans")
    if not isinstance(spans, Mapping) or "mark" not in spans:
        raise PromptError(
            f'{where}: "spans" is {spans!r}; give {{"mark": ...}}, the part of the prompt that steering marks.'
        )
    for name, place in spans.items():
        # a range refers to the rendered text, which only a tokenizer knows
        if isinstance(place, Sequence) and not isinstance(place, str):
            continue
        try:
            locate(text, place, f'{where}: span "{name}"')
        except SpanError as error:
            raise PromptError(str(error)) from error
