"""The section of trials: words, figures, a table of conditions, prompts and replies."""

from typing import Any

from interp import plots
from interp.analyses.results.trials import Trials
from interp.report.page import Page, Section, title_of
from interp.report.sections.dispatch import section
from interp.report.trials_tables import by_prompt, pivot, replies, replies_words, table
from interp.report.trials_words import few_words, trials_words

MAX_FIGURES = 4
"""measures that are drawn"""


@section.register(Trials)
def _(result: Trials, name: str, page: Page) -> Section:
    title = result.title or title_of(name)
    return Section(
        title, trials_body(result, page), page.render("sections/words.html.j2", words=trials_words(result)[:3])
    )


def trials_body(result: Trials, page: Page, measures: tuple[str, ...] = ()) -> str:
    """The HTML of trials, for a section or a part of one.

    Args:
        result: The trials.
        page: The page, to which figures are added.
        measures: Measures to draw, by default the first four.
    """
    drawn = [name for name in measures or result.measures[:MAX_FIGURES] if name in result.measures]
    sized = any(len(result.sizes(name)) > 1 for name in result.conditions)
    tasks = [task for task in result.tasks if task] if len(result.tasks) > 1 else []
    context: dict[str, Any] = {
        "title": result.title or plots.title_of(result.name),
        "words": trials_words(result),
        "few": few_words(result),
        "notes": result.notes,
        "drawn": [page.figure(plots.trials(result, measure)) for measure in drawn],
        "tasks": [page.figure(plots.trials(result, drawn[0], task)) for task in tasks],
        "pivots": [pivot(result, measure) for measure in result.measures] if sized else [],
        "rows": [] if sized else table(result),
        "prompts": None if sized or tasks else by_prompt(result),
        "replies": replies(result),
        "replies_words": replies_words(result),
        "control": result.control,
        "by_sets": result.claim is not None,
    }
    return page.render("sections/trials.html.j2", **context)
