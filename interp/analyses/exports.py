"""Packages whose attributes are the public functions and classes of their files, imported when they are first used."""

import ast
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

_LISTED = re.compile(r"^__all__ = (\[.*?\])", re.M | re.S)
_DEFINITION = re.compile(r"^(?:class|def) ([A-Za-z]\w*)", re.M)


def _public(text: str) -> list[str]:
    """The names that a file offers: those of its `__all__`, by default its public functions and classes."""
    listed = _LISTED.search(text)
    return ast.literal_eval(listed[1]) if listed else _DEFINITION.findall(text)


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the public names of the files of a package its attributes, without importing the files.

    A file offers what its `__all__` lists, by default its public functions and classes. Files whose names begin with an
    underscore are internal, and so are names that begin with one. A function with the
    name of its file takes precedence over the module.

    Args:
        package: The package's `__name__`.
        file: The package's `__file__`.

    Returns:
        `__getattr__`, `__dir__` and `__all__` of the package.
    """
    homes = {
        name: f"{package}.{path.stem}"
        for path in sorted(Path(file).parent.glob("[!_]*.py"))
        for name in _public(path.read_text(encoding="utf-8"))
    }

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; choose from {', '.join(sorted(homes))}."
            )
        return getattr(import_module(homes[name]), name)

    class Package(ModuleType):
        """A package in which an imported file does not hide the function that has its name."""

        def __setattr__(self, name: str, value: Any) -> None:
            own = isinstance(value, ModuleType) and homes.get(name) == value.__name__
            super().__setattr__(name, getattr(value, name) if own else value)

    sys.modules[package].__class__ = Package
    return find, lambda: sorted(homes), sorted(homes)
