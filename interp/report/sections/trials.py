"""The section of trials: words, figures, a table of conditions, prompts and replies."""

from typing import Any

from interp import plots
from interp.analyses.results.shown_behaviour import ACCURACY
from interp.analyses.results.trial import DRAWN
from interp.analyses.results.trials import Trials
from interp.report.page import Page, Section, title_of
from interp.report.sections.dispatch import section
from interp.report.trials_notes import condition_notes, heads_column, measure_notes
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
    drawn = [name for name in measures or _drawn(result)[:MAX_FIGURES] if name in result.measures]
    sized = result.is_sized
    tasks = [task for task in result.tasks if task] if len(result.tasks) > 1 else []
    # heads that are kept have a figure of their own
    kept = [name for name in result.tested if name in result.claims]
    parts = [kept, [name for name in result.tested if name not in kept]] if kept and sized else [[]]
    rows = [] if sized else table(result)
    context: dict[str, Any] = {
        "title": result.title or plots.title_of(result.name),
        "words": trials_words(result),
        "few": few_words(result),
        "notes": result.notes,
        "names": [*condition_notes(result), *measure_notes(result)],
        "drawn": [page.figure(plots.trials(result, measure, leave_out=names)) for measure in drawn for names in parts],
        "tasks": [page.figure(plots.trials(result, drawn[0], task)) for task in tasks],
        "pivots": [pivot(result, measure) for measure in result.measures] if sized else [],
        "rows": rows,
        "count_title": count_title(rows),
        "heads_title": heads_column(result),
        "with_sets": any(row["sets"] for row in rows),
        "prompts": None if sized or tasks else by_prompt(result),
        "replies": replies(result),
        "replies_words": replies_words(result),
        "control": result.control,
        "by_sets": result.claim is not None,
    }
    return page.render("sections/trials.html.j2", **context)


def count_title(rows: list[dict[str, Any]]) -> str:
    """The heading of the column that counts prompts; empty where no measure counts any.

    Args:
        rows: Rows of `table`.
    """
    measures = {row["measure"] for row in rows if row["count"]}
    return ("Answered right" if measures == {ACCURACY} else "Count") if measures else ""


def _drawn(result: Trials) -> list[str]:
    """The measures that random heads have as well, where there are random heads."""
    random = [trial for trial in result.trials if trial.condition in DRAWN]
    return [name for name in result.measures if not random or any(name in trial.values for trial in random)]
