"""A task: prompts with a span to steer by, right and wrong continuations, and a judge of the reply."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from interp.analyses.tasks.judges import JUDGES
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompt, Prompts

Item = Mapping[str, Any]
"""{"id", "messages" | "text", "spans", "prefix", "right", "wrong"}; other entries go to the prompt's meta"""
Judge = Callable[[str, Prompt], bool]
SPLITS = ("profile", "dev", "test", "all")


def split_of(id: str) -> Literal["profile", "dev", "test"]:
    """The fixed split of an item: the first byte of sha256(id) modulo 10 is 0-3 for profile, 4-5 for dev, 6-9 for
    test."""
    part = hashlib.sha256(id.encode()).digest()[0] % 10
    return "profile" if part < 4 else "dev" if part < 6 else "test"


def encode_item(item: Item, tokenizer: Any) -> dict[str, Any]:
    """Turn an item into one for `Prompts.encode`.

    Without a chat template, a chat becomes its texts and "Answer: prefix".

    Args:
        item: The item of a task.
        tokenizer: The tokenizer of the model.

    Returns:
        The item, as `Prompts.encode` takes it.
    """
    prefix = item.get("prefix", "")
    if "text" in item:
        return {"text": item["text"] + prefix, "spans": item["spans"]}
    turns = list(item["messages"])
    if getattr(tokenizer, "chat_template", None) is not None:
        answer = [{"role": "assistant", "content": prefix}] if prefix else []
        return {"messages": turns + answer, "spans": item["spans"]}
    if turns[-1]["role"] == "assistant":
        prefix = turns.pop()["content"]
    body = "\n\n".join(turn["content"] for turn in turns)
    return {"text": f"{body}\nAnswer: {prefix}".rstrip(), "spans": item["spans"]}


def following(text: str, continuation: str) -> str:
    """The continuation with the one space before it that the prompt's text needs, or none after white space."""
    bare = continuation.lstrip(" ")
    if text[-1:].isspace() or not text:
        return bare
    # none inside an opened quotation or bracket; a continuation that begins with a space keeps it
    glued = text[-1] in "\"'“‘([{" or bare[:1] in ".,;:!?)]}\n"
    return continuation if glued or continuation != bare else " " + bare


@dataclass(frozen=True)
class Task:
    """Prompts with known answers, in three fixed splits.

    Choose heads on "profile" and strengths on "dev", and report on "test". Every prompt has the span `span` and the
    meta task, id, split, right, wrong, prefix (the beginning of its reply, "" for none) and the other entries of its
    item. right and wrong are lists of texts that can follow the prompt as they are, the space before them included.
    Steering works where the right texts gain probability over the wrong ones. The judge accepts every right text and no
    wrong one.

    Limits:
        Does not show what a model does with other wordings; each task is one instruction in a few phrasings.
    """

    name: str
    """name, as `tasks.get` takes it"""
    description: str
    """one sentence"""
    judge: Judge = field(repr=False)
    """function of reply and prompt that gives a verdict"""
    max_new_tokens: int
    """number of new tokens of a reply, at most"""
    stop: str | None
    """text that ends a reply"""
    source: Callable[[], Iterable[Item]] = field(repr=False)
    """function that gives the items"""
    span: str = "mark"
    """span that steering marks"""
    render: Callable[[Item, Any], dict[str, Any]] = field(default=encode_item, repr=False)
    """function of item and tokenizer that gives an item for `Prompts.encode`"""

    def items(self) -> list[Item]:
        """The raw items of all splits, in the order of the source."""
        return list(self.source())

    def prompts(self, tokenizer: Any, split: str = "test", n: int | None = None) -> Prompts:
        """The prompts of a split, in an order fixed by a hash of ids.

        The first n are therefore a mixture, and they are also the first of any larger number.

        Args:
            tokenizer: The tokenizer of the model.
            split: "profile", "dev", "test" or "all".
            n: Number of prompts; by default all.

        Returns:
            Prompts: The prompts.

        Raises:
            UsageError: If the split is unknown or empty, or has fewer prompts than `n`.
            SpanError: If a span is not in its prompt.

        Examples:
            >>> len(interp.tasks.get("choice").prompts(tokenizer, "dev", n=2))
            2
        """
        if split not in SPLITS:
            raise UsageError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}.")
        every = self.items()
        chosen = [item for item in every if split in ("all", split_of(item["id"]))]
        if not chosen:
            raise UsageError(
                f'{self.name} has {len(every)} items and none in "{split}"; add items, or use split="all".'
            )
        if n is not None and not 1 <= n <= len(chosen):
            raise UsageError(
                f'n={n} is out of range; "{split}" of {self.name} has {len(chosen)} items, so use 1 to {len(chosen)}.'
            )
        chosen = sorted(chosen, key=lambda item: hashlib.sha256(f"order/{item['id']}".encode()).digest())[:n]
        rows = [{**self.render(item, tokenizer), "meta": self._meta(item)} for item in chosen]
        prompts = Prompts.encode(tokenizer, rows, continue_final=True)
        return replace(prompts, items=tuple(map(_spaced, prompts)))

    def _meta(self, item: Item) -> dict[str, Any]:
        own = {key: value for key, value in item.items() if key not in ("text", "messages", "spans")}
        return {"prefix": "", **own, "task": self.name, "split": split_of(item["id"])}

    @classmethod
    def from_jsonl(
        cls, path: str | Path, judge: str | Judge = "contains", *, max_new_tokens: int = 32, stop: str | None = None
    ) -> "Task":
        """A task from a UTF-8 file with one JSON object in each line; its name is that of the file.

        An object is {"messages": [...] or "text": t, "spans": {"mark": text in it}, "right": [...], "wrong": [...]} and
        optionally "id", "prefix", "judge" and other entries, which go to the meta. A text is used as it is, with its
        prefix right after it. After a chat, the prefix or a last assistant message is left open for the model. An item
        without "id" is known by a hash of its line. right and wrong get the space that the prompt needs.

        Args:
            path: The file.
            judge: A function of reply and prompt, or "contains", "starts", "first" (which of right and wrong is named
                first), "letter", "json". The "judge" of a line is used in its place.
            max_new_tokens: Number of new tokens of a reply, at most.
            stop: Text that ends a reply.

        Returns:
            Task: The task.

        Raises:
            PromptError: With the file and the line, if the file cannot be used.
            UsageError: If the judge is unknown.
        """
        from interp.analyses.tasks.jsonl import read

        if isinstance(judge, str) and judge not in JUDGES:
            raise UsageError(f"unknown judge {judge!r}; use a function, or one of {', '.join(JUDGES)}.")
        path = Path(path)
        items = read(path)

        def verdict(reply: str, prompt: Prompt) -> bool:
            chosen = prompt.meta.get("judge", judge)
            return (JUDGES[chosen] if isinstance(chosen, str) else chosen)(reply, prompt)

        return cls(path.stem, f"{len(items)} items of {path.name}", verdict, max_new_tokens, stop, lambda: items)


@cache
def data(name: str) -> Any:
    """The contents of a JSON file of this folder; it is read once, so do not edit the result."""
    return json.loads(files("interp.analyses.tasks").joinpath(name).read_text("utf-8"))


def _spaced(prompt: Prompt) -> Prompt:
    ends = {key: [following(prompt.text, text) for text in prompt.meta[key]] for key in ("right", "wrong")}
    return replace(prompt, meta={**prompt.meta, **ends})
