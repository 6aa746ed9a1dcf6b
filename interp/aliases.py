"""Modules by shorter names than their files have: `from interp.tasks import needle`."""

import sys
from importlib import import_module
from pkgutil import walk_packages


def alias(name: str, home: str) -> None:
    """Let `name`, and all names below it, be the modules of `home` themselves, so that none is there twice."""
    module = import_module(home)
    below = [found.name for found in walk_packages(getattr(module, "__path__", ()), f"{home}.")]
    for real in (home, *below):
        sys.modules[name + real.removeprefix(home)] = import_module(real)
