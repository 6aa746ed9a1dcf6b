"""Prompts: token ids, left padding, chat templates, and named spans found by exact character offsets."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import PromptError, SpanError
from interp.hooks.model.provenance import tokenizer_hash
from interp.hooks.prompts.spans import check_ranges, locate, token_ranges

Spans = Mapping[str, tuple[tuple[int, int], ...]]
"""Name to half-open token ranges, sorted and disjoint; positions in the unpadded sequence."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model reads it."""

    text: str
    """The whole rendered text, template included; "" where the prompt was made from ids."""
    ids: tuple[int, ...]
    spans: Spans = field(default_factory=dict, hash=False)
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prompts:
    """Prompts of one tokenizer, of any lengths; batched with padding on the left."""

    items: tuple[Prompt, ...]
    tokenizer: Any | None = field(default=None, repr=False, compare=False)
    pad_id: int = 0

    @classmethod
    def encode(
        cls,
        tokenizer: Any,
        items: Iterable[Any],
        *,
        spans: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        chat: bool | None = None,
        continue_final: bool = False,
        add_generation_prompt: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> "Prompts":
        """Encode texts or chats and find the named spans in them.

        items: a text, a list of messages {"role", "content"}, or {"text" | "messages", "spans", "meta"}.
        spans: name -> where, for all prompts, or one such table per prompt; a prompt's own "spans" come on top. Where:
          a text that occurs once; {"text": t, "occurrence": i or "all"}; a (start, stop) range of characters of the
          rendered text; or a list of these. The span is every token that overlaps those characters.
        chat: None renders messages with the chat template and takes texts as they are; True makes a text the one user
          message; False refuses messages.
        continue_final: a last assistant message is left open, for the model to go on with (an answer prefix).
        add_generation_prompt: None adds it unless the last message is the assistant's.
        template_kwargs: further variables of the template, such as {"enable_thinking": False}.
        A rendered template is encoded without special tokens, since it writes its own.
        Raises PromptError (nothing to encode, no fast tokenizer, no template, doubled BOS), SpanError (not found, found
        several times, empty).
        """
        if not getattr(tokenizer, "is_fast", False):
            raise PromptError(f"{type(tokenizer).__name__} gives no character offsets; load a fast tokenizer.")
        if isinstance(items, str | Mapping):
            raise PromptError(f"items is one {type(items).__name__}; give a list of prompts, [item] for a single one.")
        rows = [_row(item, number) for number, item in enumerate(items)]
        if not rows:
            raise PromptError("no prompts given; give at least one text or chat.")
        if spans is not None and not isinstance(spans, Mapping) and len(spans) != len(rows):
            raise SpanError(f"{len(spans)} tables of spans for {len(rows)} prompts; give one for each, or one for all.")
        prompts = []
        for number, row in enumerate(rows):
            common = spans if isinstance(spans, Mapping) else spans[number] if spans is not None else {}
            text, rendered = _text(tokenizer, row, number, chat, continue_final, add_generation_prompt, template_kwargs)
            named = {**common, **row.get("spans", {})}
            found = {name: locate(text, where, f'span "{name}" of prompt {number}') for name, where in named.items()}
            encoded = _tokens(tokenizer, text, number, special=not rendered)
            ranges = token_ranges(tokenizer, text, encoded, found, number) if found else {}
            prompts.append(Prompt(text, tuple(encoded["input_ids"]), ranges, dict(row.get("meta", {}))))
        return cls(tuple(prompts), tokenizer, _pad_id(tokenizer))

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[Sequence[int]] | Int[Tensor, "b n"],
        *,
        spans: Sequence[Mapping[str, Any]] | None = None,
        meta: Sequence[Mapping[str, Any]] | None = None,
        pad_id: int = 0,
        tokenizer: Any | None = None,
    ) -> "Prompts":
        """Prompts from token ids; spans are token ranges, one table per prompt.

        spans: [{"first": (0, 5), "all": [(0, 5), (7, 9)]}, ...]. Raises PromptError, SpanError.
        """
        rows = [tuple(int(token) for token in row) for row in ids]
        if not rows:
            raise PromptError("no prompts given; give at least one list of token ids.")
        for given, what in ((spans, "spans"), (meta, "meta")):
            if given is not None and len(given) != len(rows):
                raise PromptError(f"{len(given)} tables of {what} for {len(rows)} prompts; give one for each.")
        prompts = []
        for number, row in enumerate(rows):
            if not row:
                raise PromptError(f"prompt {number} is empty; give at least one token id.")
            if min(row) < 0:
                raise PromptError(f"prompt {number} holds the id {min(row)}; token ids count from 0.")
            named = spans[number] if spans is not None else {}
            what = 'span "{}" of prompt {}'
            ranges = {name: check_ranges(where, len(row), what.format(name, number)) for name, where in named.items()}
            prompts.append(Prompt("", row, ranges, dict(meta[number]) if meta is not None else {}))
        return cls(tuple(prompts), tokenizer, pad_id)

    @classmethod
    def from_file(cls, path: str | Path, tokenizer: Any, **settings: Any) -> "Prompts":
        """Prompts from a .txt (one a line) or .jsonl file (one {"text" | "messages", "spans", "meta"} a line), UTF-8.

        Blank lines are skipped; settings as for encode. Raises PromptError naming the file, and the line at fault.
        """
        path = Path(path)
        if path.suffix not in (".txt", ".jsonl"):
            raise PromptError(f"{path} is neither .txt (one prompt a line) nor .jsonl (one object a line).")
        try:
            # not splitlines, which would also break a prompt at its line separators (U+2028)
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"{path} cannot be read as UTF-8 text ({_reason(error)}); give another file.") from error
        items: list[Any] = [line for line in lines if line.strip()]
        if path.suffix == ".jsonl":
            items = [_json(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
        if not items:
            raise PromptError(f"{path} holds no prompts; write one a line.")
        return cls.encode(tokenizer, items, **settings)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "Prompts": ...
    def __getitem__(self, index: int | slice) -> "Prompt | Prompts":
        if isinstance(index, slice):
            return Prompts(self.items[index], self.tokenizer, self.pad_id)
        return self.items[index]

    def __add__(self, other: "Prompts") -> "Prompts":
        if not isinstance(other, Prompts):
            return NotImplemented
        mine, theirs = self.tokenizer, other.tokenizer
        both = mine is not None and theirs is not None and mine is not theirs
        if both and tokenizer_hash(mine) != tokenizer_hash(theirs):
            raise PromptError("prompts of two tokenizers cannot be joined; encode all of them with one.")
        return Prompts(self.items + other.items, mine if mine is not None else theirs, self.pad_id)

    def __repr__(self) -> str:
        names = sorted({name for prompt in self.items for name in prompt.spans})
        lengths = f"{min(self.lengths)} to {max(self.lengths)} tokens" if self.items else "no tokens"
        return f"Prompts({len(self)}, {lengths}{', spans ' + ' '.join(names) if names else ''})"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt, padding not counted."""
        return tuple(len(prompt) for prompt in self.items)

    def batches(self, size: int) -> Iterator["Prompts"]:
        """Slices of `size` prompts in order, the last one possibly shorter."""
        if size < 1:
            raise PromptError(f"a batch of {size} prompts is none; give a batch size of at least 1.")
        return (self[start : start + size] for start in range(0, len(self), size))

    def tensors(self, device: Any = "cpu") -> dict[str, Int[Tensor, "b n"]]:
        """input_ids and attention_mask, int64, padded on the left to the longest prompt."""
        if not self.items:
            raise PromptError("no prompts to make tensors of; the selection is empty.")
        width = max(self.lengths)
        ids = [[self.pad_id] * (width - len(prompt)) + list(prompt.ids) for prompt in self.items]
        mask = [[0] * (width - length) + [1] * length for length in self.lengths]
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}

    def span(self, name: str) -> list[tuple[tuple[int, int], ...]]:
        """The token ranges of a span in each prompt. Raises SpanError where a prompt does not have it."""
        for number, prompt in enumerate(self.items):
            if not prompt.spans.get(name):
                known = ", ".join(f'"{other}"' for other in prompt.spans) or "none"
                raise SpanError(f'prompt {number} has no span "{name}" (it has {known}); name it when encoding.')
        return [prompt.spans[name] for prompt in self.items]

    def span_mask(self, name: str, width: int | None = None) -> Bool[Tensor, "b n"]:
        """True at the positions of a span, counted in the unpadded sequence; width: by default the longest prompt."""
        longest = max(self.lengths, default=0)
        width = longest if width is None else width
        if width < longest:
            raise SpanError(f"a mask {width} wide cannot hold prompts of {longest} tokens; give at least {longest}.")
        mask = torch.zeros(len(self), width, dtype=torch.bool)
        for row, ranges in zip(mask, self.span(name), strict=True):
            for start, stop in ranges:
                row[start:stop] = True
        return mask

    def check_length(self, limit: int) -> None:
        """Raise PromptError, naming the first prompt longer than the model's context of `limit` tokens."""
        for number, length in enumerate(self.lengths):
            if length > limit:
                raise PromptError(
                    f"prompt {number} has {length:,} tokens; the context of this model is {limit:,}: shorten it."
                )

    def fingerprint(self) -> str:
        """First 16 hex digits of a sha256 over the ids, spans and meta of all prompts, in order."""
        rows = [[prompt.ids, sorted(prompt.spans.items()), sorted(prompt.meta.items())] for prompt in self.items]
        return hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()[:16]


def _row(item: Any, number: int) -> dict[str, Any]:
    """One given item as {"text" | "messages", "spans", "meta"}."""
    if isinstance(item, str):
        item = {"text": item}
    elif isinstance(item, Sequence):
        item = {"messages": item}
    if not isinstance(item, Mapping) or ("text" in item) == ("messages" in item):
        raise PromptError(
            f'prompt {number} is neither a text nor a chat; give a string, a list of messages, or {{"text": ...}} or '
            '{"messages": ...}.'
        )
    if unknown := set(item) - {"text", "messages", "spans", "meta"}:
        raise PromptError(f'prompt {number} has the unknown entries {sorted(map(str, unknown))}; use "meta" for them.')
    row = {key: value for key, value in item.items() if value is not None}
    for key in ("spans", "meta"):
        if not isinstance(row.get(key, {}), Mapping):
            raise PromptError(f'"{key}" of prompt {number} is {row[key]!r}; give a table with names.')
    if "messages" in row:
        _check_messages(row["messages"], number)
    elif not isinstance(row.get("text"), str) or not row["text"]:
        raise PromptError(f"prompt {number} is empty; give a text of at least one character.")
    return row


def _check_messages(messages: Any, number: int) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise PromptError(f"prompt {number} holds no messages; give a list of at least one.")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise PromptError(f'prompt {number} holds {message!r}; a message is {{"role": ..., "content": ...}}.')


def _text(
    tokenizer: Any,
    row: Mapping[str, Any],
    number: int,
    chat: bool | None,
    continue_final: bool,
    add_generation_prompt: bool | None,
    template_kwargs: Mapping[str, Any] | None,
) -> tuple[str, bool]:
    """The text to encode, and whether a template wrote it."""
    if "text" in row and not chat:
        return row["text"], False
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["text"]}]
    if chat is False:
        raise PromptError(f"prompt {number} is a chat but chat=False; give it as a text, or leave chat=None.")
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(f"prompt {number} is a chat, but the tokenizer has no chat template; give it as a text.")
    from jinja2 import TemplateError

    answered = messages[-1]["role"] == "assistant"
    go_on = continue_final and answered
    generation = not answered if add_generation_prompt is None else add_generation_prompt
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=generation and not go_on,
            continue_final_message=go_on,
            **(template_kwargs or {}),
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise PromptError(
            f"the chat template refuses prompt {number} ({_reason(error)}); change its messages, or give it as a text."
        ) from error
    return text, True


def _tokens(tokenizer: Any, text: str, number: int, special: bool) -> Mapping[str, Any]:
    encoded = tokenizer(
        text,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    ids = encoded["input_ids"]
    if not ids:
        raise PromptError(f"prompt {number} has no tokens; give a text that the tokenizer keeps.")
    bos = getattr(tokenizer, "bos_token_id", None)
    if encoded["special_tokens_mask"][0] and bos is not None and ids[:2] == [bos, bos]:
        raise PromptError(
            f'prompt {number} begins with "{tokenizer.bos_token}", which the tokenizer adds too; leave it out.'
        )
    return encoded


def _pad_id(tokenizer: Any) -> int:
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in known if token is not None), 0)


def _json(line: str, path: Path, number: int) -> Any:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise PromptError(f"line {number} of {path} is not JSON ({error}); write one object a line.") from error
    if not isinstance(item, Mapping):
        raise PromptError(f'line {number} of {path} is no object; write {{"text": ...}} or {{"messages": [...]}}.')
    return item


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
