"""Methods that find heads, one published method in each file: `f(model, prompts, **settings) -> HeadScores`.

Methods that compare two kinds of prompts take both, such as patching: `f(model, clean, corrupt, metric, **settings)`. A
file offers what its `__all__` lists, by default the function with the name of the file, so no list of methods is kept
here. Names are imported when they are first used.
"""

import ast
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

_LISTED = re.compile(r"^__all__ = (\[.*?\])", re.M | re.S)


@cache
def _homes() -> dict[str, str]:
    """Name -> the file that offers it."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        listed = _LISTED.search(path.read_text(encoding="utf-8"))
        found |= dict.fromkeys(ast.literal_eval(listed[1]) if listed else [path.stem], path.stem)
    return found


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_homes())
    if name not in _homes():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; choose from {', '.join(_homes())}.")
    value = getattr(import_module(f"{__name__}.{_homes()[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes(), "__all__"})


class _Package(ModuleType):
    """A package that shows a function where a file and its function share a name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # an import sets the module on its package
        if isinstance(value, ModuleType) and _homes().get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
