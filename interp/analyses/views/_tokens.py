"""Tokens of prompts and of the vocabulary, shared by the views of what heads write."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.analyses.views.attention_lens import Top
from interp.errors import HeadError, UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context


class Token(NamedTuple):
    """A token of the vocabulary and the number that a head adds to its logit."""

    text: str
    id: int
    logit: float


class Place(NamedTuple):
    """A token of a prompt and its position."""

    text: str
    id: int
    position: int


class Writes(NamedTuple):
    """Tokens and logits of some rows, `[... k]` each."""

    ids: Int[Tensor, "... k"]
    logits: Float[Tensor, "... k"]

    @classmethod
    def of(cls, top: Top) -> "Writes":
        """From the values and columns that `extremes` returns."""
        return cls(top[1].cpu(), top[0].float().cpu())

    def tokens(self, texts: Mapping[str, str]) -> Any:
        """The tokens as nested tuples of `Token`, in the order of the rows."""
        return _nested(self.ids.tolist(), self.logits.tolist(), texts)


def _nested(ids: Any, logits: Any, texts: Mapping[str, str]) -> Any:
    if isinstance(ids, list):
        return tuple(_nested(one, other, texts) for one, other in zip(ids, logits, strict=True))
    return Token(texts[str(ids)], ids, short(logits))


def texts_of(tokenizer: Any, *ids: Tensor) -> dict[str, str]:
    """Token id as text -> the token's text, for all ids in some tensors; negative ones are left out."""
    known = sorted({token for each in ids for token in each.unique().tolist() if token >= 0})
    return {str(token): token_text(tokenizer, token) for token in known}


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token with its spaces, or its name in the vocabulary where it has no text.

    Args:
        tokenizer: A transformers tokenizer; None gives the number as text.
        token: A token id, which may lie past the end of the vocabulary.
    """
    if tokenizer is None:
        return str(token)
    text, known = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    if str(known).startswith("▁"):
        # sentencepiece, which leaves out a space at the beginning
        return str(known).replace("▁", " ")
    # an id past the end of the vocabulary, or a piece of a character
    return str(token) if known is None else text if text and "\ufffd" not in text else str(known)


def labels_of(prompts: Prompts) -> tuple[str, ...]:
    """A label for each prompt: the id or the question in its `meta`, else its number."""
    return tuple(
        str(prompt.meta.get("id") or prompt.meta.get("question") or f"prompt {number}")
        for number, prompt in enumerate(prompts)
    )


def short(value: float) -> float:
    """A number rounded to five digits."""
    return float(f"{value:.5g}")


def namer(tokenizer: Any) -> Callable[[int], str]:
    """`token_text` of one tokenizer, with a cache."""
    return cache(partial(token_text, tokenizer))


def chosen_heads(heads: Any, layout: HeadLayout) -> HeadSet:
    """The heads that `HeadSet.parse` reads. Raises HeadError for none."""
    chosen = HeadSet.parse(heads, layout)
    if not len(chosen):
        raise HeadError('no heads were given; name at least one, as in "L5H3".')
    return chosen


def read_at(model: nn.Module, prompts: Prompts, queries: str) -> tuple[Prompts, tuple[Place, ...]]:
    """The prompts up to the position that is read, which a causal model never looks beyond, and that position."""
    check_context(model, prompts)
    stops = list(prompts.lengths) if queries == "last" else [ranges[-1][1] for ranges in prompts.span(queries)]
    items = tuple(replace(prompt, ids=prompt.ids[:stop]) for prompt, stop in zip(prompts, stops, strict=True))
    name = namer(prompts.tokenizer)
    places = tuple(Place(name(prompt.ids[-1]), prompt.ids[-1], len(prompt) - 1) for prompt in items)
    return replace(prompts, items=items), places


def place_of_head(head: Any, heads: Sequence[str]) -> int:
    """The number of a head in a view. Raises HeadError."""
    name = str(Head.parse(head))
    if name not in heads:
        raise HeadError(f"{name} is not in this view; choose from {', '.join(heads)}.")
    return list(heads).index(name)


def place_of_prompt(prompt: int, labels: Sequence[str]) -> int:
    """The number of a prompt, checked. Raises UsageError."""
    if not 0 <= prompt < len(labels):
        raise UsageError(f"prompt {prompt} of a view of {len(labels)}; give a number from 0 to {len(labels) - 1}.")
    return prompt


def stacked(rows: Sequence[Tensor], fill: float) -> Tensor:
    """Tensors `[h t ...]` as one `[n h t ...]`; the shorter ones are filled up along t."""
    width = max(row.shape[1] for row in rows)
    full = [row.new_full((row.shape[0], width, *row.shape[2:]), fill) for row in rows]
    for target, row in zip(full, rows, strict=True):
        target[:, : row.shape[1]] = row
    return torch.stack(full)
