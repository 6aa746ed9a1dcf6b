"""The section of a score table: a map of all heads, the top heads, and their intervals."""

from interp import plots
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.head_roles import cut_of
from interp.report import words
from interp.report.page import Page, Section, title_of
from interp.report.sections.dispatch import section

N_TOP = 10
"""heads that are listed"""


@section.register(HeadScores)
def _(result: HeadScores, name: str, page: Page) -> Section:
    top = result.top(N_TOP)
    tables = (result.values, result.low, result.high, result.frequency)
    title = title_of(name)
    return Section(
        title,
        page.render(
            "sections/head_scores.html.j2",
            title=title,
            map=page.figure(plots.head_map(result)),
            facts=words.facts(result),
            top=page.figure(plots.top_heads(result, N_TOP)) if top else None,
            positions=page.figure(plots.positions(result)) if "positions" in result.extras and top else None,
            rows=[(head, *(float(table[head]) for table in tables)) for head in top],
        ),
        page.render("sections/head_scores_digest.html.j2", s=words.summary(result, cut_of(name, result))),
    )
