"""Named spans: from a text to find, or a range of characters, to ranges of tokens."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import accumulate
from typing import Any

from interp.errors import SpanError

Range = tuple[int, int]
# the space as byte-level vocabularies write it
_SPACE = "Ġ"


def locate(text: str, where: Any, what: str) -> list[Range]:
    """Character ranges of a span in `text`; `what` names the span in errors. Raises SpanError."""
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
                f"{what}: characters {start} to {stop} are not a range of a text of {len(text):,} characters; "
                "give 0 <= start < stop, counted in the rendered text."
            )
        return [(start, stop)]
    if isinstance(where, Sequence) and where:
        return [place for part in where for place in locate(text, part, what)]
    raise SpanError(f"{what}: {where!r} is no place; give a text, a (start, stop) range of characters, or a list.")


def occurrences(text: str, part: str) -> list[int]:
    """Where `part` begins in `text`, overlapping ones included."""
    found: list[int] = []
    at = text.find(part) if part else -1
    while at >= 0:
        found.append(at)
        at = text.find(part, at + 1)
    return found


def nearest_text(text: str, part: str) -> str:
    """The piece of `text` around the longest stretch that it shares with `part`, whole words, or "" for none.

    One pass of difflib over the first million characters, with the first 80 of `part`; case is ignored where that keeps
    every character in place.
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
    """Every token that overlaps the characters of each place, as sorted disjoint ranges. Raises SpanError."""
    offsets = exact_offsets(tokenizer, text, encoded)
    kept = [i for i, added in enumerate(encoded["special_tokens_mask"]) if not added]
    # running bounds keep the search right even where a normaliser makes offsets step back
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
                    f"(characters {start} to {stop}); the tokenizer drops it, choose a wider span."
                )
            tokens.append((kept[first], kept[last] + 1))
        ranges[name] = _merge_overlaps(tokens)
    return ranges


def exact_offsets(tokenizer: Any, text: str, encoded: Mapping[str, Any]) -> list[Range]:
    """The characters that each token holds, its spaces included; (0, 0) for the special tokens that were added.

    Byte-level tokenizers may cut a token's leading and trailing spaces off its offsets (trim_offsets), which leaves
    tokens of spaces without width; the token's own text says how many to give back.
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
            # where the point stands that is left of a token of spaces depends on the version; where it begins does not
            spaces = text[edge : edge + before]
            offsets[i] = edge, edge + len(spaces) - len(spaces.lstrip(" "))
        edge = max(edge, offsets[i][1])
    return offsets


def check_ranges(where: Any, length: int, what: str) -> tuple[Range, ...]:
    """Token ranges as given with ids: one (start, stop) or a list of them, inside the prompt. Raises SpanError."""
    places = [where] if _is_range(where) else where
    if not isinstance(places, Sequence) or not places or not all(_is_range(place) for place in places):
        raise SpanError(f"{what}: {where!r} is not a range of tokens; give (start, stop) or a list of these.")
    for start, stop in places:
        if not 0 <= start < stop <= length:
            raise SpanError(
                f"{what}: tokens {start} to {stop} are not a range of a prompt of {length} tokens; "
                "give 0 <= start < stop."
            )
    return _merge_overlaps([(start, stop) for start, stop in places])


def _locate_occurrence(text: str, where: Mapping[str, Any], what: str) -> list[Range]:
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
            f'time{"s" * (len(found) > 1)}, give 0 to {len(found) - 1} or "all".'
        )
    return [found[which]]


def _raise_absent(text: str, part: str, what: str) -> list[Range]:
    if not part:
        raise SpanError(f"{what} is an empty text; give at least one character.")
    near = nearest_text(text, part)
    advice = f"the nearest text is {_quote(near)}" if near else "nothing in the prompt is like it"
    raise SpanError(f"{what}: {_quote(part)} is not in the prompt; {advice}.")


def _merge_overlaps(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Sorted, with those that overlap made one, so that no token is counted twice."""
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
