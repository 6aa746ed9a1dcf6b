"""Named spans: from a text or a range of characters to ranges of tokens."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import accumulate
from typing import Any, NoReturn

from interp.errors import SpanError

Range = tuple[int, int]
# the space in byte-level vocabularies
_SPACE = "Ġ"


def locate(text: str, where: Any, what: str) -> list[Range]:
    """Find the characters of a span.

    Args:
        text: The text of the prompt.
        where: The place of the span, in any form that `Prompts.encode` reads.
        what: The name of the span in error messages.

    Returns:
        Half-open character ranges.

    Raises:
        SpanError: If the place is not in the text, is ambiguous, or has an unknown form.
    """
    if isinstance(where, str):
        found = occurrences(text, where)
        if len(found) > 1:
            raise SpanError(
                f"{what}: {_quote(where)} occurs {len(found)} times; give "
                '{"text": ..., "occurrence": i or "all"}, or a (start, stop) range of characters.'
            )
        return [(start, start + len(where)) for start in found] or _raise_absent(text, where, what)
    if isinstance(where, Mapping):
        return _locate_occurrence(text, where, what)
    if _is_range(where):
        start, stop = where
        if not 0 <= start < stop <= len(text):
            raise SpanError(
                f"{what}: characters {start} to {stop} are not a range within a text of {len(text):,} characters; "
                "give 0 <= start < stop, counted in the rendered text."
            )
        return [(start, stop)]
    if isinstance(where, Sequence) and where:
        return [place for part in where for place in locate(text, part, what)]
    raise SpanError(
        f"{what}: {where!r} is not a place in a text; give a text, a (start, stop) range of characters, or a list."
    )


def occurrences(text: str, part: str) -> list[int]:
    """Return the positions at which `part` begins in `text`, including overlapping occurrences."""
    found: list[int] = []
    at = text.find(part) if part else -1
    while at >= 0:
        found.append(at)
        at = text.find(part, at + 1)
    return found


def nearest_text(text: str, part: str) -> str:
    """Find the piece of a text that is most like another text, for error messages.

    The longest common substring is found in one pass of difflib over the first million characters of `text` and the
    first 80 of `part`. Case is ignored where lower-casing keeps every character in place.

    Args:
        text: The text to search.
        part: The text that is similar to the piece.

    Returns:
        The piece around the longest common substring, extended to whole words; "" where the texts share nothing.
    """
    text, part = text[:1_000_000], part[:80]
    lower = (text.lower(), part.lower())
    same = len(lower[0]) == len(text) and len(lower[1]) == len(part)
    matcher = SequenceMatcher(None, *(lower if same else (text, part)), autojunk=False)
    match = matcher.find_longest_match()
    if not match.size:
        return ""
    start = max(match.a - match.b, 0)
    stop = min(max(match.a - match.b + len(part), match.a + match.size), len(text))
    while start > 0 and re.fullmatch(r"\w\w", text[start - 1 : start + 1]):
        start -= 1
    while stop < len(text) and re.fullmatch(r"\w\w", text[stop - 1 : stop + 1]):
        stop += 1
    return text[start:stop].strip()


def token_ranges(
    tokenizer: Any, text: str, encoded: Mapping[str, Any], places: Mapping[str, Sequence[Range]], number: int
) -> dict[str, tuple[Range, ...]]:
    """Find the tokens that overlap the characters of each place.

    Args:
        tokenizer: The tokenizer of the text.
        text: The text of the prompt.
        encoded: The encoding of the text, with offsets and the mask of special tokens.
        places: Span name to character ranges.
        number: The index of the prompt, for error messages.

    Returns:
        Span name to sorted, disjoint token ranges.

    Raises:
        SpanError: If no token overlaps a range.
    """
    offsets = exact_offsets(tokenizer, text, encoded)
    kept = [i for i, added in enumerate(encoded["special_tokens_mask"]) if not added]
    # running bounds keep the bisection correct where a normaliser makes offsets decrease
    ends = list(accumulate((offsets[i][1] for i in kept), max))
    starts = list(accumulate((offsets[i][0] for i in reversed(kept)), min))[::-1]
    ranges: dict[str, tuple[Range, ...]] = {}
    for name, found in places.items():
        tokens: list[Range] = []
        for start, stop in found:
            first, last = bisect_right(ends, start), bisect_left(starts, stop) - 1
            if first > last:
                raise SpanError(
                    f'span "{name}" of prompt {number}: no token holds {_quote(text[start:stop])} '
                    f"(characters {start} to {stop}), because the tokenizer drops it; choose a wider span."
                )
            tokens.append((kept[first], kept[last] + 1))
        ranges[name] = _merge_overlaps(tokens)
    return ranges


def exact_offsets(tokenizer: Any, text: str, encoded: Mapping[str, Any]) -> list[Range]:
    """Find the characters of each token, including its spaces.

    Byte-level tokenizers may trim leading and trailing spaces from the offsets of a token (trim_offsets), so that a
    token of spaces has no width. The text of the token tells how many spaces to restore.

    Args:
        tokenizer: The tokenizer of the text.
        text: The text of the prompt.
        encoded: The encoding of the text, with offsets and the mask of special tokens.

    Returns:
        A half-open character range for each token; (0, 0) for special tokens that the tokenizer added.
    """
    offsets: list[Range] = [(start, stop) for start, stop in encoded["offset_mapping"]]
    kept = [i for i, added in enumerate(encoded["special_tokens_mask"]) if not added]
    bounds = [0, *(offsets[i][1] for i in kept)], [*(offsets[i][0] for i in kept), len(text)]
    if all(start <= edge for edge, start in zip(*bounds, strict=True)):
        return offsets
    tokens = tokenizer.convert_ids_to_tokens([encoded["input_ids"][i] for i in kept])
    edge = 0
    for i, token, following in zip(kept, tokens, bounds[1][1:], strict=True):
        start, stop = offsets[i]
        before = len(token) - len(token.lstrip(_SPACE))
        after = len(token) - len(token.rstrip(_SPACE))
        if before < len(token):
            offsets[i] = min(start, max(edge, start - before)), max(stop, min(stop + after, following))
        elif start == stop:
            # the zero-width offset of a token of spaces depends on the version; the end of the token before it does not
            spaces = text[edge : edge + before]
            offsets[i] = edge, edge + len(spaces) - len(spaces.lstrip(" "))
        edge = max(edge, offsets[i][1])
    return offsets


def check_ranges(where: Any, length: int, what: str) -> tuple[Range, ...]:
    """Check the token ranges that a user gives with token ids.

    Args:
        where: One (start, stop) range, or a list of ranges.
        length: Number of tokens of the prompt.
        what: The name of the span in error messages.

    Returns:
        Sorted, disjoint token ranges.

    Raises:
        SpanError: If a range does not lie inside the prompt.
    """
    places = [where] if _is_range(where) else where
    if not isinstance(places, Sequence) or not places or not all(_is_range(place) for place in places):
        raise SpanError(f"{what}: {where!r} is not a range of tokens; give (start, stop) or a list of these.")
    for start, stop in places:
        if not 0 <= start < stop <= length:
            raise SpanError(
                f"{what}: tokens {start} to {stop} are not a range within a prompt of {length} tokens; "
                "give 0 <= start < stop."
            )
    return _merge_overlaps([(start, stop) for start, stop in places])


def _locate_occurrence(text: str, where: Mapping[str, Any], what: str) -> list[Range]:
    """Find the character ranges of a place of the form {"text": ..., "occurrence": ...}."""
    part, which = where.get("text"), where.get("occurrence")
    if not isinstance(part, str) or set(where) - {"text", "occurrence"}:
        raise SpanError(f'{what}: {dict(where)!r} is not a place; give {{"text": ..., "occurrence": i or "all"}}.')
    if which is None:
        return locate(text, part, what)
    found = [(start, start + len(part)) for start in occurrences(text, part)] or _raise_absent(text, part, what)
    if which == "all":
        return found
    if not isinstance(which, int) or isinstance(which, bool) or not -len(found) <= which < len(found):
        raise SpanError(
            f"{what}: {_quote(part)} has no occurrence {which!r}; it occurs {len(found)} "
            f'time{"s" * (len(found) > 1)}; give 0 to {len(found) - 1}, or "all".'
        )
    return [found[which]]


def _raise_absent(text: str, part: str, what: str) -> NoReturn:
    """Raise the error of a text that is not in the prompt, with the text nearest to it."""
    if not part:
        raise SpanError(f"{what} is given by an empty text; give at least one character.")
    near = nearest_text(text, part)
    advice = f"the nearest text is {_quote(near)}" if near else "nothing in the prompt is similar"
    raise SpanError(f"{what}: {_quote(part)} is not in the prompt; {advice}.")


def _merge_overlaps(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Sort ranges and merge those that overlap, so that no token is counted twice."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def _is_range(where: Any) -> bool:
    return (
        isinstance(where, tuple | list)
        and len(where) == 2
        and all(isinstance(part, int) and not isinstance(part, bool) for part in where)
    )


def _quote(text: str) -> str:
    return f'"{text if len(text) <= 80 else text[:77] + "..."}"'
