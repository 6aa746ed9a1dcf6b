"""Prompts: token ids with left padding, chat templates, and named spans found by exact character offsets."""

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
from interp.hooks.limits import read_text
from interp.hooks.model.provenance import tokenizer_hash
from interp.hooks.prompts.encoding import normalize_item, padding_id, parse_json_line, render_text, tokenize
from interp.hooks.prompts.spans import check_ranges, locate, token_ranges

Spans = Mapping[str, tuple[tuple[int, int], ...]]
"""Span name to half-open token ranges, sorted and disjoint; positions count in the unpadded sequence."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model reads it.

    Examples:
        >>> len(prompts[0]), prompts[0].spans["first"]
        (17, ((1, 9),))
    """

    text: str
    """The whole rendered text, with the chat template; "" for a prompt made from token ids."""
    ids: tuple[int, ...]
    """The token ids, without padding."""
    spans: Spans = field(default_factory=dict, hash=False)
    """The named spans, as token ranges."""
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further facts about the prompt, such as its answer."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prompts:
    """Prompts of any lengths for one tokenizer, padded on the left in a batch.

    Make them with `encode`, `from_ids` or `from_file`, or with the functions of `interp.tasks`. `len`, iteration,
    indexing and slicing work as for a tuple of prompts, and `+` joins prompts of the same tokenizer.

    Examples:
        >>> prompts
        Prompts(2, 17 to 17 tokens, spans first second)
        >>> len(prompts + prompts[:1])
        3
    """

    items: tuple[Prompt, ...]
    """The prompts in order."""
    tokenizer: Any | None = field(default=None, repr=False, compare=False)
    """The tokenizer that encoded them; None where they were made from ids alone."""
    pad_id: int = 0
    """Token id of the padding."""

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
        keep_end: bool = False,
    ) -> "Prompts":
        """Encode texts or chats, and find the named spans in them.

        The place of a span is one of:

        - a text that occurs exactly once in the prompt;
        - `{"text": t, "occurrence": i}` or `{"text": t, "occurrence": "all"}`;
        - a (start, stop) range of characters of the rendered text;
        - a list of these.

        The span consists of every token that overlaps those characters. A chat that the template has rendered is
        encoded without special tokens, because the template writes them itself.

        Args:
            tokenizer: A fast tokenizer.
            items: The prompts. Each is a text, a list of messages `{"role", "content"}`, or a dict with "text" or
                "messages" and, optionally, "spans" and "meta".
            spans: Span name to place for all prompts, or one such dict for each prompt. The "spans" of an item are
                added and take precedence.
            chat: None renders messages with the chat template and leaves texts unchanged. True makes each text the only
                user message of a chat. False refuses messages.
            continue_final: Leave a final assistant message open, so that the model continues it (an answer prefix).
            add_generation_prompt: Whether the template adds the start of the assistant's reply; None adds it unless the
                last message is the assistant's.
            template_kwargs: Further variables of the template, such as `{"enable_thinking": False}`.
            keep_end: Keep special tokens that the tokenizer adds after a text, such as EOS. They are left out by
                default, with a warning, because a model does not continue a text that has ended.

        Returns:
            The prompts.

        Raises:
            PromptError: If there is nothing to encode, the tokenizer is not fast, a chat has no template, or a text
                begins with a BOS token that the tokenizer adds as well.
            SpanError: If the text of a span is absent, occurs several times without "occurrence", or holds no token.

        Examples:
            >>> made = interp.Prompts.encode(tokenizer, ["The cat sat."], spans={"animal": "cat"})
            >>> made.span("animal")
            [((4, 7),)]
        """
        if not getattr(tokenizer, "is_fast", False):
            raise PromptError(f"{type(tokenizer).__name__} gives no character offsets; load a fast tokenizer.")
        if isinstance(items, str | Mapping):
            raise PromptError(
                f"items is a single {type(items).__name__}; give a list of prompts, or [item] for a single prompt."
            )
        rows = [normalize_item(item, number) for number, item in enumerate(items)]
        if not rows:
            raise PromptError("no prompts given; give at least one text or chat.")
        if spans is not None and not isinstance(spans, Mapping) and len(spans) != len(rows):
            raise SpanError(f"{len(spans)} tables of spans for {len(rows)} prompts; give one for each, or one for all.")
        prompts = []
        for number, row in enumerate(rows):
            common = spans if isinstance(spans, Mapping) else spans[number] if spans is not None else {}
            text, rendered = render_text(
                tokenizer, row, number, chat, continue_final, add_generation_prompt, template_kwargs
            )
            named = {**common, **row.get("spans", {})}
            found = {name: locate(text, where, f'span "{name}" of prompt {number}') for name, where in named.items()}
            encoded = tokenize(tokenizer, text, number, special=not rendered, keep_end=keep_end)
            ranges = token_ranges(tokenizer, text, encoded, found, number) if found else {}
            prompts.append(Prompt(text, tuple(encoded["input_ids"]), ranges, dict(row.get("meta", {}))))
        return cls(tuple(prompts), tokenizer, padding_id(tokenizer))

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
        """Make prompts from token ids.

        Args:
            ids: Token ids of each prompt, without padding.
            spans: For each prompt, span name to a token range (start, stop) or a list of ranges.
            meta: For each prompt, further facts to store with it.
            pad_id: Token id of the padding.
            tokenizer: The tokenizer of the ids, for analyses that decode or encode text.

        Returns:
            The prompts; the text of each is "".

        Raises:
            PromptError: If there are no prompts, a prompt is empty or holds a negative id, or `spans` or `meta` does
                not have one entry for each prompt.
            SpanError: If a range does not lie inside its prompt.

        Examples:
            >>> made = interp.Prompts.from_ids([[5, 6, 7, 8]], spans=[{"first": (0, 2), "ends": [(0, 1), (3, 4)]}])
            >>> made[0].spans["ends"]
            ((0, 1), (3, 4))
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
                raise PromptError(f"prompt {number} holds the token id {min(row)}; give ids from 0 upwards.")
            named = spans[number] if spans is not None else {}
            what = 'span "{}" of prompt {}'
            ranges = {name: check_ranges(where, len(row), what.format(name, number)) for name, where in named.items()}
            prompts.append(Prompt("", row, ranges, dict(meta[number]) if meta is not None else {}))
        return cls(tuple(prompts), tokenizer, pad_id)

    @classmethod
    def from_file(cls, path: str | Path, tokenizer: Any, **settings: Any) -> "Prompts":
        """Read prompts from a UTF-8 text file; blank lines are skipped.

        Args:
            path: A .txt file with one text on each line, or a .jsonl file with one object on each line: "text" or
                "messages" and, optionally, "spans" and "meta".
            tokenizer: A fast tokenizer.
            **settings: The remaining arguments of `encode`.

        Returns:
            The prompts.

        Raises:
            PromptError: If the file cannot be read or holds no prompts, or a line is not valid; the message names the
                file and the line.
            SpanError: As in `encode`.

        Examples:
            >>> path = folder / "prompts.txt"
            >>> _ = path.write_text("The cat sat.\\nThe dog ran.\\n")
            >>> interp.Prompts.from_file(path, tokenizer).lengths
            (12, 12)
        """
        path = Path(path)
        if path.suffix not in (".txt", ".jsonl"):
            raise PromptError(
                f"{path} is neither a .txt nor a .jsonl file; give one with one prompt or one object on each line."
            )
        # splitlines() would also split a prompt at line separators (U+2028)
        lines = read_text(path, PromptError).split("\n")
        items: list[Any] = [line for line in lines if line.strip()]
        if path.suffix == ".jsonl":
            items = [parse_json_line(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
        if not items:
            raise PromptError(f"{path} holds no prompts; write one on each line.")
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
            raise PromptError("prompts of two tokenizers cannot be joined; encode all of them with one tokenizer.")
        return Prompts(self.items + other.items, mine if mine is not None else theirs, self.pad_id)

    def __repr__(self) -> str:
        names = sorted({name for prompt in self.items for name in prompt.spans})
        lengths = f"{min(self.lengths)} to {max(self.lengths)} tokens" if self.items else "no tokens"
        return f"Prompts({len(self)}, {lengths}{', spans ' + ' '.join(names) if names else ''})"

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each prompt, without padding.

        Examples:
            >>> prompts.lengths
            (17, 17)
        """
        return tuple(len(prompt) for prompt in self.items)

    def batches(self, size: int) -> Iterator["Prompts"]:
        """Split the prompts into batches, in order.

        Args:
            size: Number of prompts in a batch; the last batch may be smaller.

        Returns:
            An iterator over the batches.

        Raises:
            PromptError: If `size` is below 1.

        Examples:
            >>> [len(batch) for batch in prompts.batches(1)]
            [1, 1]
        """
        if size < 1:
            raise PromptError(f"the batch size is {size}; give a batch size of at least 1.")
        return (self[start : start + size] for start in range(0, len(self), size))

    def tensors(self, device: Any = "cpu") -> dict[str, Int[Tensor, "b n"]]:
        """Make the inputs of a model, padded on the left to the longest prompt.

        Args:
            device: Device of the tensors.

        Returns:
            `input_ids` and `attention_mask`, both int64 `[b n]`.

        Raises:
            PromptError: If there are no prompts.

        Examples:
            >>> prompts.tensors()["input_ids"].shape
            torch.Size([2, 17])
        """
        if not self.items:
            raise PromptError("an empty selection of prompts has no tensors; select at least one prompt.")
        width = max(self.lengths)
        ids = [[self.pad_id] * (width - len(prompt)) + list(prompt.ids) for prompt in self.items]
        mask = [[0] * (width - length) + [1] * length for length in self.lengths]
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}

    def span(self, name: str) -> list[tuple[tuple[int, int], ...]]:
        """The token ranges of a named span in each prompt.

        Args:
            name: Name of the span.

        Returns:
            For each prompt, half-open ranges of positions in the unpadded sequence.

        Raises:
            SpanError: If a prompt does not have the span.

        Examples:
            >>> prompts.span("second")
            [((9, 17),), ((9, 17),)]
        """
        for number, prompt in enumerate(self.items):
            if not prompt.spans.get(name):
                known = ", ".join(f'"{other}"' for other in prompt.spans) or "none"
                raise SpanError(f'prompt {number} has no span "{name}" (it has {known}); name it when encoding.')
        return [prompt.spans[name] for prompt in self.items]

    def span_mask(self, name: str, width: int | None = None) -> Bool[Tensor, "b n"]:
        """Make a mask that is true at the positions of a span, counted in the unpadded sequence.

        Args:
            name: Name of the span.
            width: Number of positions; by default the length of the longest prompt.

        Returns:
            Bool `[b n]`.

        Raises:
            SpanError: If a prompt does not have the span, or `width` is smaller than the longest prompt.

        Examples:
            >>> prompts.span_mask("first").sum(1)
            tensor([8, 8])
        """
        longest = max(self.lengths, default=0)
        width = longest if width is None else width
        if width < longest:
            raise SpanError(
                f"a mask of width {width} cannot hold prompts of {longest} tokens; give at least {longest}."
            )
        mask = torch.zeros(len(self), width, dtype=torch.bool)
        for row, ranges in zip(mask, self.span(name), strict=True):
            for start, stop in ranges:
                row[start:stop] = True
        return mask

    def check_length(self, limit: int) -> None:
        """Check that every prompt fits into the context of a model.

        Args:
            limit: Number of tokens of the context.

        Raises:
            PromptError: If a prompt is longer; the message names the first such prompt.

        Examples:
            >>> prompts.check_length(512)
        """
        for number, length in enumerate(self.lengths):
            if length > limit:
                raise PromptError(
                    f"prompt {number} has {length:,} tokens, but the context of this model is {limit:,}; shorten it."
                )

    def fingerprint(self) -> str:
        """Hash the ids, spans and meta of all prompts in order: the first 16 hexadecimal digits of a SHA-256.

        Examples:
            >>> prompts.fingerprint() == prompts[:1].fingerprint()
            False
        """
        rows = [[prompt.ids, sorted(prompt.spans.items()), sorted(prompt.meta.items())] for prompt in self.items]
        return hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()[:16]
