"""Settings of an analysis next to those of its source, for reports, lists and documentation."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from interp.analyses.docstrings import argument_lines
from interp.analyses.prompt_sizes import PromptSizes

if TYPE_CHECKING:
    from interp.analyses.entries import Entry

OWN_PROMPTS = "your own prompts"
"""shown in place of a size of the standard prompts where the user gave prompts"""


@dataclass(frozen=True)
class SettingRow:
    """A setting with the value that a run uses, and that of the source."""

    name: str
    used: str
    """the value of the run, as text"""
    source: str = ""
    """the value of the source, as text; empty where the source is not known to have one"""
    help: str = ""
    """meaning of the setting: the first sentence of its line in the docstring"""
    is_set: bool = True
    """whether the value of the run is more than "none" """

    @property
    def differs(self) -> bool:
        """Whether the source has another value; words about the same value, as in "16, unconfirmed", are no other."""
        return bool(self.source) and not re.match(rf'"?{re.escape(self.used)}(?![\w.]|,\d)', self.source)


def setting_rows(
    entry: "Entry", used: Mapping[str, Any] | None = None, sizes: Mapping[str, Any] | None = None, own: bool = False
) -> list[SettingRow]:
    """The settings of an entry, then the sizes and task settings of its prompts that its source states.

    Args:
        entry: An entry of the registry. Its `source_settings` hold the values of the source by the name of a setting,
            of a field of `PromptSizes`, or of a task's parameter, such as "relations.shots".
        used: Values of a run, which take the place of the defaults of a run.
        sizes: Fields of the `PromptSizes` of the run, by default those of a run without options.
        own: Whether the user's own prompts took the place of the standard ones.

    Returns:
        One row for each setting of the entry and for each name in `source_settings`; sizes that are not in `sizes` are
        left out.
    """
    source: Mapping[str, Any] = getattr(entry, "source_settings", {})
    known = asdict(PromptSizes()) if sizes is None else sizes
    values = _in_run(entry, known) | dict(used or {})
    rows = [(name, values[name]) for name in entry.settings]
    for name in source:
        if name in values:
            continue
        if own:
            rows.append((name, OWN_PROMPTS))
        elif "." in name:
            rows.append((name, _of_task(name)))
        elif name in known:
            rows.append((name, known[name]))
    return [
        SettingRow(name, text(value), text(source[name]) if name in source else "", _help(entry, name), is_set(value))
        for name, value in rows
    ]


def is_set(value: Any) -> bool:
    """Whether a value of a setting is more than None, an empty text or an empty collection.

    Args:
        value: A value of a setting.
    """
    return value is not None and not (isinstance(value, str | Sequence | Mapping) and not value)


def _help(entry: "Entry", name: str) -> str:
    """The first sentence on a setting, a size or a parameter of a task, without the marks of code."""
    setting = entry.settings.get(name)
    lines = {name: setting.help} if setting else argument_lines(_task(name) if "." in name else PromptSizes)
    line = " ".join(lines.get(name.rpartition(".")[2], "").replace("`", "").split())
    return re.split(r"(?<=[^\s.]\.) (?=[A-Z\"])", line, maxsplit=1)[0]


def text(value: Any) -> str:
    """A value as a table shows it: text as it is, other values as the option `--set` takes them.

    Args:
        value: A value of a setting.
    """
    if isinstance(value, str):
        # line breaks and other control characters would not be seen
        return (value if value.isprintable() else json.dumps(value, ensure_ascii=False)) or "none"
    if value is None:
        return "none"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or "by default"
    return json.dumps(value, ensure_ascii=False, default=str)


def _in_run(entry: "Entry", sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run without options: the run's own, else the defaults of the function."""
    defaults = {name: setting.default for name, setting in entry.settings.items()}
    given = {
        name: sizes.get(value[1:], value) if isinstance(value, str) and value.startswith("$") else value
        for name, value in getattr(entry, "run_settings", {}).items()
        if not str(value).startswith("$") or value[1:] in sizes
    }
    return defaults | {name: value for name, value in given.items() if name in defaults}


def _of_task(name: str) -> Any:
    """The default of a parameter of a task, which the standard prompts use."""
    return inspect.signature(_task(name)).parameters[name.partition(".")[2]].default


def _task(name: str) -> Any:
    from interp.analyses import tasks

    return getattr(tasks, name.partition(".")[0])
