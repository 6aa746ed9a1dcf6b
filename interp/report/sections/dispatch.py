"""`section`: the part of a page that shows a result, chosen by its type."""

from functools import singledispatch
from typing import Any

from interp import plots
from interp.analyses.results.result import Result
from interp.errors import InterpError
from interp.report.page import Page, Section, title_of


@singledispatch
def section(result: Any, name: str, page: Page) -> Section:
    """Show a result; this default shows its figure, where it has one, and its summary.

    The page adds the heading, what the analysis measures, its limits, and its control. A section must not depend on
    other results.

    Args:
        result: A result of a run.
        name: Its name in the run.
        page: The page, to which figures are added.

    Returns:
        Section: Title, HTML, and the entry of the overview.
    """
    try:
        drawn = page.figure(plots.figure(result))
    except InterpError:
        # a result without a figure is shown as text
        drawn = None
    summary = result.summary() if isinstance(result, Result) else str(result)
    first = next(iter(summary.splitlines()), "")
    return Section(
        title_of(name),
        page.render("sections/other.html.j2", drawn=drawn, summary=summary),
        page.render("sections/words.html.j2", words=[first] if drawn is None and first else []),
    )
