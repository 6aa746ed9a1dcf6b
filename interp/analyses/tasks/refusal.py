"""Refusal: requests that a chat model should decline, others of the same form, and whether a reply declines.

"harmful" and "harmless" are a hundred pairs with the same verb and syntax, and "borderline" are harmless requests with
alarming words. Neutral texts, for a loss, and easy questions show what else a change to the model breaks. All of
refusal.json was written for this project; other sets come from `requests_from`.

Source: the contrast of harmful and harmless requests of Arditi et al. 2406.11717 and Zhou et al. 2410.13708.
Differs: other requests, general in wording, matched in pairs.
Limits: does not show how a model resists attacks, nor whether what it says instead of refusing would help anyone.
"""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from interp.analyses.tasks.refused import Rate as Rate
from interp.analyses.tasks.refused import judge_error as judge_error
from interp.analyses.tasks.refused import refused as refused
from interp.analyses.tasks.task import data
from interp.errors import PromptError, UsageError
from interp.hooks.limits import check_regular
from interp.hooks.prompts.prompts import Prompts

Kind = Literal["harmful", "harmless", "borderline"]
COLUMNS = ("goal", "prompt", "input", "instruction", "text")
"""names of the column of requests; the first that a file has is used"""
PLAIN = "## Query: {}\n## Answer:"
"""for a tokenizer without a chat template; source: Zhou et al. 2410.13708"""


def requests(tokenizer: Any, kind: Kind = "harmful", n: int | None = None, system: str | None = None) -> Prompts:
    """Requests as chats, in an order fixed by a hash, so that the first n are also the first of any larger number.

    The two requests of a pair are at the same place of harmful and harmless. Meta: task "refusal", id, kind, category
    ("" unless harmful), question (the request).

    Args:
        tokenizer: The tokenizer of the model.
        kind: "harmful", "harmless" or "borderline".
        n: Number of requests; by default all.
        system: A system message before each request.

    Returns:
        Prompts: The requests.

    Raises:
        UsageError: If the kind is unknown, or there are fewer requests than `n`.
        PromptError: If the chat template takes no system message.

    Examples:
        >>> len(interp.tasks.refusal.requests(tokenizer, "harmless", n=2))
        2
    """
    if kind not in get_args(Kind):
        raise UsageError(f"unknown kind of request {kind!r}; choose from {', '.join(get_args(Kind))}.")
    rows = first(kind, n)
    return Prompts.encode(tokenizer, [item_of(tokenizer, row["text"], meta(row, kind), system) for row in rows])


def requests_from(path: str | Path, tokenizer: Any, column: str | None = None) -> Prompts:
    """Requests of a CSV file with a header, such as that of AdvBench, in its order; empty cells are skipped.

    Meta: task "refusal", id (file and line of the table), kind (the name of the file), category "", question.

    Args:
        path: A CSV file in UTF-8.
        tokenizer: The tokenizer of the model.
        column: Name of the column, in any case; by default the first of goal, prompt, input, instruction, text.

    Returns:
        Prompts: The requests.

    Raises:
        PromptError: If the file does not exist, is not UTF-8, has no such column, or holds no requests.
    """
    path = Path(path)
    texts = read(path, column)
    rows = [{"id": f"{path.name}/{i}", "category": "", "text": text} for i, text in texts.items()]
    return Prompts.encode(tokenizer, [item_of(tokenizer, row["text"], meta(row, path.stem)) for row in rows])


def neutral_texts(tokenizer: Any, n: int | None = None) -> Prompts:
    """Twenty encyclopedic paragraphs of 60 to 100 words as plain texts, or the first n; the loss on them is a control.

    Meta: task "refusal", id, kind "neutral".

    Args:
        tokenizer: The tokenizer of the model.
        n: Number of texts; by default all.

    Limits:
        Does not show skills; a loss may stay the same where reasoning degrades.
    """
    rows = first("neutral", n)
    made = [{"text": row["text"], "meta": {"task": "refusal", "id": row["id"], "kind": "neutral"}} for row in rows]
    return Prompts.encode(tokenizer, made)


def easy(tokenizer: Any, n: int | None = None) -> Prompts:
    """Forty very easy questions as chats, or the first n, for `judges.contains`: a control of what a model can do.

    Meta: task "refusal", id, kind "easy", category "", question, right (any of these texts is right), wrong (none),
    answer (the first right one).

    Args:
        tokenizer: The tokenizer of the model.
        n: Number of questions; by default all.

    Limits:
        Does not show a finer loss of skill; a model that fails these is broken.
    """
    made = []
    for row in first("easy", n):
        more = {"right": row["right"], "wrong": [], "answer": row["right"][0]}
        made.append(item_of(tokenizer, row["text"], {**meta(row, "easy"), **more}))
    return Prompts.encode(tokenizer, made)


def first(key: str, n: int | None) -> list[dict[str, Any]]:
    """The first n entries of a list of refusal.json, in the order of a hash of their numbers."""
    rows = data("refusal.json")[key]
    if n is not None and not 1 <= n <= len(rows):
        raise UsageError(f"n={n} is out of range; refusal.json has {len(rows)} {key} entries, so use 1 to {len(rows)}.")
    # of the number alone, so that pairs stay together
    number = {row["id"]: row["id"].rpartition("/")[2] for row in rows}
    return sorted(rows, key=lambda row: hashlib.sha256(f"order/{number[row['id']]}".encode()).digest())[:n]


def meta(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Meta of a request."""
    category = row.get("category", "")
    return {"task": "refusal", "id": row["id"], "kind": kind, "category": category, "question": row["text"]}


def item_of(tokenizer: Any, text: str, meta: Mapping[str, Any], system: str | None = None) -> dict[str, Any]:
    """A request as an item for `Prompts.encode`: a chat, or a plain text where the tokenizer has no chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return {"text": (f"{system}\n\n" if system else "") + PLAIN.format(text), "meta": meta}
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": [*before, {"role": "user", "content": text}], "meta": meta}


def read(path: Path, column: str | None) -> dict[int, str]:
    """Texts of a column by the number of their row, from 1."""
    check_regular(path, PromptError, what="a CSV file in UTF-8")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"{path} cannot be read as a CSV file in UTF-8 ({reason}); give another file.") from error
    at = place(path, header, column)
    texts = {i: row[at].strip() for i, row in enumerate(rows, 1) if at < len(row) and row[at].strip()}
    if not texts:
        raise PromptError(f'{path} holds no requests under "{header[at]}"; write one request in each row.')
    return texts


def place(path: Path, header: Sequence[str], column: str | None) -> int:
    """Number of the column of requests."""
    names = [name.strip().casefold() for name in header]
    if not any(names):
        raise PromptError(f"{path} is empty; begin it with a header such as goal, and write one request in each row.")
    wanted = COLUMNS if column is None else (column.strip().casefold(),)
    found = next((names.index(name) for name in wanted if name in names), None)
    if found is None:
        missing = f'"{column}"' if column is not None else f"of the names {', '.join(COLUMNS)}"
        raise PromptError(f"{path} has no column {missing}; it has {', '.join(header)}; choose one with column=.")
    return found
