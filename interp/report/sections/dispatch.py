"""`section`: the part of a page that shows a result, chosen by its type."""

from dataclasses import fields, is_dataclass
from functools import singledispatch
from typing import Any

from interp import plots
from interp.analyses.results.result import Result
from interp.errors import InterpError
from interp.report.page import Page, RenderedFigure, Section, title_of


@singledispatch
def section(result: Any, name: str, page: Page) -> Section:
    """Show a result; this default shows its figure, the results that it holds, and its summary.

    The page adds the heading, what the analysis measures, its limits, and its control. A section must not depend on
    other results.

    Args:
        result: A result of a run.
        name: Its name in the run.
        page: The page, to which figures are added.

    Returns:
        Section: Title, HTML, and the entry of the overview.
    """
    drawn = _figure(result, page)
    summary = result.summary() if isinstance(result, Result) else str(result)
    first = next(iter(summary.splitlines()), "")
    parts = [(title, section(part, f"{name}.{title}", page).body) for title, part in parts_of(result)]
    return Section(
        title_of(name),
        page.render("sections/other.html.j2", drawn=drawn, summary=summary, parts=parts),
        page.render("sections/words.html.j2", words=[first] if drawn is None and first else []),
    )


def parts_of(result: Any) -> list[tuple[str, Result]]:
    """The results that a result holds, with their names: those in its fields, and in dictionaries that are its fields.

    Args:
        result: Any result.
    """
    found: list[tuple[str, Result]] = []
    for each in fields(result) if is_dataclass(result) else ():
        value, label = getattr(result, each.name), each.name.replace("_", " ")
        if isinstance(value, Result):
            found.append((label, value))
        elif isinstance(value, dict):
            found += [(f"{label}, {key}", part) for key, part in value.items() if isinstance(part, Result)]
    return found


def _figure(result: Any, page: Page) -> RenderedFigure | None:
    try:
        return page.figure(plots.figure(result))
    except InterpError:
        # a result without a figure is shown as text
        return None
