"""Saved edits are read by the classes that the registry knows."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from interp.analyses import registry
from interp.hooks.edit.edit import Edits


def load_edits(path: str | Path) -> Edits:
    """Read edits that `save` wrote.

    Edits of this package and of installed ones are known, and those that this process declared with `@edit`.

    Args:
        path: The JSON file.

    Raises:
        UsageError: For a file that holds no edits, or an unknown one.

    Examples:
        >>> edits = interp.steer.Boost("first", 2.0) + interp.steer.Temperature(0.5)
        >>> interp.steer.load_edits(edits.save(folder / "edits.json")) == edits
        True
    """
    return Edits.load(path, _find)


def edits_from_dicts(entries: Iterable[Mapping[str, Any]]) -> Edits:
    """The edits whose `to_dict` gave these dictionaries.

    Args:
        entries: Fields of each edit, with its class name as "edit".

    Raises:
        UsageError: For an unknown class, or fields that it does not have.
    """
    return Edits.from_dicts(entries, _find)


def _find(name: str) -> Any:
    return registry.class_named(name, "edit")
