"""Sections of a report, one module for each type of result.

Every module of this folder is imported, so that a section registers by being here; other packages add theirs with
`section.register`.
"""

from importlib import import_module
from pkgutil import iter_modules

from interp.report.sections.dispatch import section

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")

__all__ = ["section"]
