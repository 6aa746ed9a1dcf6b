"""Docstrings of methods read as data: their sections, and the settings of a function or dataclass."""

import inspect
import re
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

# parameters that a run fills in, or that are not settings of a method
_NOT_SETTINGS = {"self", "model", "seed", "batch_size", "progress", "folder", "tokenizer"}


@dataclass(frozen=True)
class Setting:
    """One setting of an entry: a keyword parameter of its function, or a field of its dataclass."""

    name: str
    default: Any
    kind: str
    """its annotation, as text"""
    help: str = ""
    """its line in the docstring"""


def settings_of(thing: Any) -> dict[str, Setting]:
    """Keyword parameters of a function, or fields of a dataclass, that are settings of a method."""
    help_texts = argument_lines(thing)
    if inspect.isclass(thing) and is_dataclass(thing):
        return {
            f.name: Setting(
                f.name, None if f.default is MISSING else f.default, _type_name(f.type), help_texts.get(f.name, "")
            )
            for f in fields(thing)
            if f.init
        }
    found = {}
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in _NOT_SETTINGS:
            default = None if parameter.default is parameter.empty else parameter.default
            kind = "" if parameter.annotation is parameter.empty else _type_name(parameter.annotation)
            found[parameter.name] = Setting(parameter.name, default, kind, help_texts.get(parameter.name, ""))
    return found


def _type_name(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def sections_of(thing: Any) -> dict[str, str]:
    """The parts of a Google-style docstring: "summary", "text", then "args", "returns", "source", "limits" and others.

    A section begins with a line such as `Source:` that is not indented and goes on as far as lines are indented.
    """
    lines = (inspect.getdoc(thing) or "").splitlines()
    parts: dict[str, list[str]] = {"summary": [], "text": []}
    part = "summary"
    for line in lines:
        heading = re.fullmatch(r"([A-Z][a-z]+):", line)
        if heading:
            part = heading[1].lower()
            parts[part] = []
        elif part == "summary" and not line.strip():
            part = "text"
        else:
            parts[part].append(line)
    return {name: inspect.cleandoc("\n" + "\n".join(found)).strip() for name, found in parts.items() if any(found)}


def argument_lines(thing: Any) -> dict[str, str]:
    """Argument -> its description, from the section Args or Attributes of a docstring."""
    sections = sections_of(thing)
    found: dict[str, str] = {}
    last = ""
    for line in (sections.get("args") or sections.get("attributes") or "").splitlines():
        match = re.match(r"(\w+)(?: \([^)]*\))?: (.*)", line)
        if match:
            last = match[1]
            found[last] = match[2].strip()
        elif last:
            found[last] += f" {line.strip()}"
    return found
