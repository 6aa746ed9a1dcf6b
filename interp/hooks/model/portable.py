"""The one place that decides which text may leave the machine: names of files stay, and the way to them does not."""

import contextlib
import getpass
import os
import re
import socket
import tempfile
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

HOME, ELSEWHERE = "~", "…"
"""in place of a last part that is the name of the user, or of the computer"""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_CACHE = re.compile(r"models--([^/\\]+?)--([^/\\]+)")
"""folder of a model in the cache of the hub"""
_SEPARATOR = re.compile(r"[/\\]")
# a drive, a share, a user's home, a variable, a computer, a dot before a separator, or two folders from the root
_ROOT = re.compile(
    r"(?:[A-Za-z]:[/\\]|\\\\|~|\$\w|\$\{|%\w+%[/\\]|file:|[\w.-]+@[\w.-]+:|\.{1,2}[/\\]|/[^/\s]+/)", re.ASCII
)
# "--out=", "sinks.path=" or "-o", before the value of an argument
_OPTION = re.compile(r"(?:--?[\w.-]+=|-[A-Za-z](?=.*[/\\~$])|[\w.-]+=)")
_FRACTION = re.compile(r"[\d.]+/[\d.]+")
# a path inside of a sentence; the address of a web page is none, since its slashes follow a colon or a slash
_IN_TEXT = re.compile(
    r"(?:file:/*|(?<![\w:/.~-])~[\w.-]*[/\\]|(?<![\w:/.<-])/(?=[^\s/])|(?<!\w)[A-Za-z]:[/\\]|\\\\(?=\w)"
    r"|(?<![\w./-])\.{1,2}[/\\])[^\s\"'`<>|,;:()=]*"
)
_RELATIVE = re.compile(r"(?<![\w/:.-])[\w.-]+(?:[/\\][\w.-]+)+")


def portable(value: Any) -> Any:
    """A value with every path in it cut to its last part, the name of a file or folder.

    A text is a path if it begins as one, or if a file or folder of that name exists. Any other text is unchanged,
    unless it holds the home, the working folder or the temporary folder.

    Args:
        value: Texts, numbers, lists and dicts.

    Returns:
        The value; tuples become lists, as JSON has them.

    Examples:
        >>> from interp.hooks.model.portable import portable
        >>> portable({"task": "/home/ann/study/mine.jsonl", "heads": "L0H1", "ratio": 0.5})
        {'task': 'mine.jsonl', 'heads': 'L0H1', 'ratio': 0.5}
    """
    if isinstance(value, str):
        if is_path(value):
            return last_part(value)
        return portable_text(value) if any(place in value for place in _places()) else value
    if isinstance(value, os.PathLike):
        return last_part(os.fspath(value))
    if isinstance(value, Mapping):
        return {name: portable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [portable(each) for each in value]
    return value


def portable_command(arguments: Sequence[str], keep: Collection[str] = ()) -> str:
    """A command line with every path cut to its last part.

    Arguments that hold a separator are cut whether or not a file of that name exists, since outputs do not exist yet.

    Args:
        arguments: The words of the command; the first is the program.
        keep: Names with a separator that are no paths, such as the hub id of the model.

    Returns:
        The command.

    Examples:
        >>> from interp.hooks.model.portable import portable_command
        >>> portable_command(["/opt/bin/interp", "report", "org/model", "--output=/home/ann/r.html"], ["org/model"])
        'interp report org/model --output=r.html'
    """
    words = [last_part(arguments[0]) if arguments else ""]
    for word in arguments[1:]:
        before, value = "", word
        while value not in keep and not value.startswith(("/", "\\", "~")) and (option := _OPTION.match(value)):
            before, value = before + option[0], value[option.end() :]
        kept = value in keep or _FRACTION.fullmatch(value)
        has_path = _SEPARATOR.search(value) is not None or is_path(value)
        words.append(before + (value if kept or not has_path else last_part(value)))
    return " ".join(words)


def portable_text(text: str) -> str:
    """A sentence, such as an error or a remark, with every path in it cut to its last part.

    Args:
        text: The sentence.

    Returns:
        The sentence.

    Examples:
        >>> from interp.hooks.model.portable import portable_text
        >>> portable_text("/home/ann/study/x.json cannot be read, see https://example.org/help")
        'x.json cannot be read, see https://example.org/help'
    """
    # their names may hold spaces, which end a path in a sentence
    for place in _places():
        text = text.replace(place + os.sep, "./")
    text = _IN_TEXT.sub(lambda found: _cut(found[0]), text)
    return _RELATIVE.sub(lambda found: _cut(found[0]) if os.path.exists(found[0]) else found[0], text)


def portable_model(name: str) -> str:
    """The name of a model: a hub id, also for a folder in the cache of the hub, or the last part of a path.

    Args:
        name: A name or a path.

    Returns:
        The name.

    Examples:
        >>> from interp.hooks.model.portable import portable_model
        >>> portable_model("/home/ann/.cache/hub/models--org--small/snapshots/0123"), portable_model("org/small")
        ('org/small', 'org/small')
    """
    if cached := HUB_CACHE.search(name):
        return f"{cached[1]}/{cached[2]}"
    if is_path(name) or (_SEPARATOR.search(name) and not HUB_ID.fullmatch(name)):
        return last_part(name)
    return name


def is_path(text: str) -> bool:
    """Whether a text is a path: it begins as one, or has a separator and names something that exists."""
    if _ROOT.match(text):
        return True
    try:
        return _SEPARATOR.search(text) is not None and os.path.exists(os.path.expanduser(text))
    except (OSError, ValueError):
        return False


def last_part(path: str) -> str:
    """The last part of a path, unless it is the name of the user or of the computer.

    Args:
        path: A path.
    """
    name = _SEPARATOR.split(path.rstrip("/\\"))[-1] if path.strip("/\\") else path
    user, host = _own_names()
    if name.startswith("~") or name in user:
        return HOME
    # ann@computer:file
    name = re.sub(r"^[\w.-]+@[\w.-]+:|^file:|^[A-Za-z]:", "", name)
    return ELSEWHERE if name in host or name.startswith("$") else name


def _cut(found: str) -> str:
    """The last part of a path in a sentence, with the full stop that ends the sentence."""
    path = found.rstrip(".")
    return last_part(path) + found[len(path) :]


def _places() -> list[str]:
    """Folders that belong to this computer, the longest first."""
    found = [str(Path.home()), tempfile.gettempdir()]
    # it may have been removed
    with contextlib.suppress(OSError):
        found.append(os.getcwd())
    return sorted({place for place in found if len(place) > 1}, key=len, reverse=True)


def _own_names() -> tuple[frozenset[str], frozenset[str]]:
    """Names of the user and of the computer; the home may change with the environment."""
    return _user_names() | {Path.home().name}, _host_names()


@cache
def _user_names() -> frozenset[str]:
    try:
        return frozenset({getpass.getuser()})
    except (OSError, KeyError, ImportError):
        return frozenset()


@cache
def _host_names() -> frozenset[str]:
    host = socket.gethostname()
    return frozenset({host, host.partition(".")[0]} - {""})
