"""The name of an attention head, such as "L5H3", and the words that name several heads."""

import itertools
import operator
import re
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from interp.errors import HeadError
from interp.hooks.limits import MAX_HEADS, MAX_INDEX, parse_index, shortened

if TYPE_CHECKING:
    from interp.hooks.model.heads import HeadLayout

_HEAD = re.compile(r"L(\d+)H(\d+)|(\d+)[.-](\d+)", re.IGNORECASE)
_HEADS_OF_LAYER = re.compile(r"L(\d+)(?:H\*)?|(\d+)\.\*", re.IGNORECASE)
_HEAD_OF_LAYERS = re.compile(r"L\*H(\d+)|\*\.(\d+)", re.IGNORECASE)
_LAYERS = re.compile(r"L(\d+)-L(\d+)", re.IGNORECASE)
_HEADS = re.compile(r"(L\d+H\d+)-(L\d+H\d+)", re.IGNORECASE)


class Head(NamedTuple):
    """One query head of one layer, both counted from 0; it prints as "L5H3".

    Examples:
        >>> interp.Head(5, 3)
        L5H3
        >>> interp.Head.parse("5.3").layer
        5
    """

    layer: int
    """Layer index, counted from 0."""
    head: int
    """Index of the query head in its layer, counted from 0."""

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    def __repr__(self) -> str:
        return str(self)

    @classmethod
    def parse(cls, spec: Any) -> "Head":
        """Parse the name of one head.

        Args:
            spec: "L5H3", "5.3", "5-3", the pair (5, 3), or a Head. The number 5.3 is refused, because 5.3 and 5.30 are
                the same number but two different heads.

        Returns:
            The head.

        Raises:
            HeadError: If `spec` does not name a head.

        Examples:
            >>> interp.Head.parse("L5H3"), interp.Head.parse((7, 0))
            (L5H3, L7H0)
        """
        if isinstance(spec, str):
            found = _HEAD.fullmatch(spec.strip())
            if found:
                layer, head = (parse_index(part, HeadError, spec) for part in found.groups() if part is not None)
                return cls(layer, head)
        elif isinstance(spec, tuple | list) and len(spec) == 2 and all(_is_index(part) for part in spec):
            layer, head = (operator.index(part) for part in spec)
            if max(layer, head) > MAX_INDEX:
                raise HeadError(
                    f"a layer or head above {MAX_INDEX:,} is more than any model has; give one that it has."
                )
            if min(layer, head) < 0:
                shown = f"{spec!r}" if min(layer, head) > -MAX_INDEX else "a pair"
                raise HeadError(f"{shown} has a negative index; layers and heads are counted from 0 upwards.")
            return cls(layer, head)
        raise HeadError(f'{reprlib.repr(spec)} does not name a head; write "L5H3", "5.3", "5-3" or (5, 3).')


def parse_heads(spec: Any, layout: "HeadLayout | None") -> Iterable[Head]:
    """Parse every form of heads that `HeadSet.parse` reads; heads may repeat.

    Args:
        spec: A text, a Head, a (layer, head) pair, or an iterable of any of these.
        layout: The layout of the model, for words that cover several heads.

    Returns:
        The heads in the order in which they are named.

    Raises:
        HeadError: If a word does not name heads, or needs `layout`.
    """
    if isinstance(spec, Head):
        return (spec,)
    if isinstance(spec, str):
        words = re.sub(r"\s*-\s*", "-", spec).replace(",", " ").replace(";", " ").split()
        if not words:
            raise HeadError('an empty text does not name heads; write "L5H3", "L5H*", "L8-L12" or "all".')
        return _at_most(MAX_HEADS, (head for word in words for head in _parse_word(word, layout)))
    if isinstance(spec, tuple | list) and len(spec) == 2 and all(_is_index(part) for part in spec):
        return (Head.parse(spec),)
    if isinstance(spec, Iterable):
        return _at_most(MAX_HEADS, (head for part in spec for head in parse_heads(part, layout)))
    raise HeadError(f'{reprlib.repr(spec)} does not name heads; write "L5H3, L7H0", (5, 3), or a list of these.')


def _at_most(limit: int, heads: Iterable[Head]) -> list[Head]:
    """The heads as a list, which no input makes longer than any model is large."""
    found = list(itertools.islice(heads, limit + 1))
    if len(found) > limit:
        raise HeadError(f"more than {limit:,} heads are named, more than any model has; name each head once.")
    return found


def _parse_word(word: str, layout: "HeadLayout | None") -> Iterable[Head]:
    if _HEAD.fullmatch(word):
        return (Head.parse(word),)
    if ends := _HEADS.fullmatch(word):
        first, last = (Head.parse(end) for end in ends.groups())
        if first <= last and first.layer == last.layer:
            if layout is not None:
                layout.check([first, last])
            return [Head(first.layer, head) for head in range(first.head, last.head + 1)]
        return _between(word, first, last, layout)
    if found := _LAYERS.fullmatch(word):
        one, other = (parse_index(part, HeadError, word) for part in found.groups())
        first, last = Head(one, 0), Head(other, _require_layout(word, layout).heads - 1)
        return _between(word, first, last, layout)
    if found := _HEADS_OF_LAYER.fullmatch(word):
        layer = parse_index(found[1] or found[2], HeadError, word)
        return [Head(layer, head) for head in range(_require_layout(word, layout).heads)]
    if found := _HEAD_OF_LAYERS.fullmatch(word):
        head = parse_index(found[1] or found[2], HeadError, word)
        return [Head(layer, head) for layer in range(_require_layout(word, layout).layers)]
    if word.lower() == "all":
        return _require_layout(word, layout).all()
    raise HeadError(
        f'"{shortened(word)}" does not name heads; write "L5H3", "5.3", "L5H*", "L8-L12", "L3H1-L3H4" or "all".'
    )


def _between(word: str, first: Head, last: Head, layout: "HeadLayout | None") -> Iterable[Head]:
    if first > last:
        raise HeadError(f'"{word}" runs backwards; write the lower end of the range first.')
    known = _require_layout(word, layout)
    known.check([first, last])
    return [head for head in known.all() if first <= head <= last]


def _require_layout(word: str, layout: "HeadLayout | None") -> "HeadLayout":
    if layout is None:
        raise HeadError(f'"{word}" covers several heads, which depend on the model; pass layout=HeadLayout.of(model).')
    return layout


def _is_index(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
