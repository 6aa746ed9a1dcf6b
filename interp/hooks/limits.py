"""Limits for everything that comes from a file or an argument, so that no input takes all time or memory.

Each reader of the package reads through this module, or checks its file with it first. The limits are far above what
real inputs need.
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from interp.errors import InterpError, UsageError
from interp.hooks.writer import KINDS, reason

MB = 1 << 20
MAX_TEXT_BYTES = 256 * MB
"""size of a file of prompts, head lists, results or settings"""
MAX_DEPTH = 100
"""depth of lists and objects in JSON and YAML"""
MAX_DIGITS = 1000
"""digits of a number"""
MAX_INDEX = 100_000
"""layers of a model, or heads of a layer"""
MAX_HEADS = 200_000
"""heads that one text names"""
MAX_COUNT = 10_000_000
"""any number of prompts, tokens, steps or draws that a setting names"""
MAX_SEED = 2**63 - 1


def check_regular(
    path: Path, error: type[InterpError], limit: int | None = MAX_TEXT_BYTES, what: str = "a file"
) -> int:
    """Check that a path is a regular file, or a link to one, of a size that can be read.

    Args:
        path: The file.
        error: Class of the error that is raised.
        limit: Largest size in bytes; None for no limit.
        what: Kind of file, for the error.

    Returns:
        Its size in bytes.

    Raises:
        InterpError: Of the class `error`, for a folder, for a device or a named pipe, since reading it may block or
            never end, and for a file that is too large.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as failed:
        name = path if str(path).isprintable() else repr(str(path))
        raise error(f"{name} cannot be read as {what} ({reason(failed)}); give another file.") from failed
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise error(f"{path} cannot be read as {what}, since it is {kind}; give a regular file.")
    if limit is not None and found.st_size > limit:
        raise error(
            f"{path} has {found.st_size / MB:,.0f} MB, and files of its kind may have {limit / MB:,.0f} MB; "
            "split it or give another file."
        )
    return found.st_size


def read_text(path: str | Path, error: type[InterpError], limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a regular file in UTF-8.

    Args:
        path: The file.
        error: Class of the error that is raised.
        limit: Largest size in bytes.

    Returns:
        The text, without a byte order mark.

    Raises:
        InterpError: Of the class `error`, if the file cannot be read, is no regular file, is too large, or is not
            UTF-8.

    Examples:
        >>> from interp.errors import PromptError
        >>> from interp.hooks.limits import read_text
        >>> _ = (folder / "a.txt").write_text("one line")
        >>> read_text(folder / "a.txt", PromptError)
        'one line'
    """
    path = Path(path)
    check_regular(path, error, limit, "UTF-8 text")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as failed:
        raise error(f"{path} cannot be read as UTF-8 text ({reason(failed)}); give another file.") from failed


def parse_json(text: str | bytes) -> Any:
    """Parse JSON within limits of depth and of digits.

    Args:
        text: The JSON.

    Returns:
        Numbers, texts, lists and dicts.

    Raises:
        ValueError: If the text is not JSON, is nested deeper than 100 levels, or holds an integer of more than
            1,000 digits.

    Examples:
        >>> from interp.hooks.limits import parse_json
        >>> parse_json('{"alpha": 0.5}')
        {'alpha': 0.5}
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    if _depth(value) > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    return value


def parse_yaml(text: str) -> Any:
    """Parse YAML without aliases, within limits of depth and of digits.

    An alias repeats a part of the file, so that a few hundred bytes can stand for billions of values.

    Args:
        text: The YAML.

    Raises:
        ValueError: If the text is not YAML, or is outside the limits.

    Examples:
        >>> from interp.hooks.limits import parse_yaml
        >>> parse_yaml("attn_head_set: 13-18,13-21")
        {'attn_head_set': '13-18,13-21'}
    """
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases (* and &), which no head list needs")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
            # base 60 makes numbers of many digits out of short texts with colons
            if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _is_long_number(event.value):
                raise ValueError(f"it has a number of more than {MAX_DIGITS} digits")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


@contextlib.contextmanager
def refusing(what: str, error: type[InterpError], action: str) -> Iterator[None]:
    """Turn any error about an input into one sentence, where an input from elsewhere is read for the first time.

    Args:
        what: Beginning of the sentence, such as "the run in x cannot be shown".
        error: Class of the error that is raised.
        action: What to do, as the end of the sentence.

    Raises:
        InterpError: Of the class `error`, for every exception but an InterpError, which passes. With INTERP_TRACEBACK
            set, all exceptions pass.

    Examples:
        >>> from interp.errors import ScoreError
        >>> from interp.hooks.limits import refusing
        >>> with refusing("x.json is broken", ScoreError, "make it again"):
        ...     {}["scores"]
        Traceback (most recent call last):
        interp.errors.ScoreError: x.json is broken (KeyError: 'scores'); make it again.
    """
    try:
        yield
    except InterpError:
        raise
    except Exception as failed:
        if os.environ.get("INTERP_TRACEBACK"):
            raise
        reason = shortened(" ".join(f"{type(failed).__name__}: {failed}".split()), 200)
        raise error(f"{what} ({reason}); {action}.") from failed


def parse_index(text: str, error: type[InterpError], what: str) -> int:
    """A layer or a head, from digits.

    Args:
        text: Digits.
        error: Class of the error that is raised.
        what: The word that holds them, for the error.

    Raises:
        InterpError: Of the class `error`, for a number that no model has.
    """
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(MAX_INDEX)) or int(digits) > MAX_INDEX:
        raise error(f"{shortened(what)} names layer or head {shortened(digits)}, more than any model has.")
    return int(digits)


def shortened(text: str, width: int = 60) -> str:
    """A text of an input for an error message, cut in the middle where it is long.

    Args:
        text: The text.
        width: Largest number of characters.

    Examples:
        >>> from interp.hooks.limits import shortened
        >>> shortened("7" * 1000, width=9)
        '7777...77'
    """
    return text if len(text) <= width else f"{text[: width - 5]}...{text[-2:]}"


def check_counts(settings: Mapping[str, Any], before: str = "") -> None:
    """Raise UsageError for a number in settings that no machine can count to, or that is no number.

    Args:
        settings: Names and values; values other than numbers, lists and dicts are left to other checks.
        before: Beginning of the names in the error.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            check_counts(value, f"{before}{name}.")
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise UsageError(f"{before}{name}={each} is not finite; give a number.")
            if not isinstance(each, int) or isinstance(each, bool):
                continue
            if name == "seed" and not 0 <= each <= MAX_SEED:
                raise UsageError(f"{before}seed={_decimal(each)} is not valid; give a number from 0 to {MAX_SEED}.")
            if name != "seed" and abs(each) > MAX_COUNT:
                raise UsageError(f"{before}{name}={_decimal(each)} is too large; give at most {MAX_COUNT:,}.")


def _decimal(value: int) -> str:
    """An integer as text; Python refuses to write one of thousands of digits."""
    return shortened(str(value)) if value.bit_length() < 4000 else f"a number of {value.bit_length()} bits"


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits")
    return int(text)


def _is_long_number(text: str) -> bool:
    return len(text) > MAX_DIGITS and set(text) <= set("0123456789_:+-xXabcdefABCDEFo.")


def _depth(value: Any) -> int:
    """Depth of lists and dicts, without recursion."""
    depth, level = 0, [value]
    while level := [part for each in level for part in _parts(each)]:
        depth += 1
        if depth > MAX_DEPTH:
            break
    return depth


def _parts(value: Any) -> Iterator[Any]:
    """The lists and dicts in a list or dict."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in inner if isinstance(part, dict | list))
