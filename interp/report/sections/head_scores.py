"""The section of a score table: a map of all heads, the top heads, and their intervals."""

from interp import plots
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.head_scores_text import unranked
from interp.analyses.views.head_roles import threshold_of
from interp.report import words
from interp.report.extra_columns import extra_columns
from interp.report.page import Page, Section, title_of
from interp.report.sections.dispatch import section

N_TOP = 10
"""heads that are listed"""


@section.register(HeadScores)
def _(result: HeadScores, name: str, page: Page) -> Section:
    top, threshold = result.leading(N_TOP), threshold_of(name, result)
    title = title_of(name)
    columns = extra_columns(name, result, [each.head for each in top])
    controls = [column.words for column in columns if column.words]
    return Section(
        title,
        page.render(
            "sections/head_scores.html.j2",
            title=title,
            map=page.figure(plots.head_map(result)),
            facts=[*controls, words.stability(result), *words.facts(result, threshold)],
            columns=columns,
            curve=page.figure(plots.threshold_curve(result, threshold)) if (result.values > 0).any() else None,
            top=page.figure(plots.top_heads(result, N_TOP)) if top else None,
            positions=page.figure(plots.positions(result)) if "positions" in result.extras and top else None,
            rows=[(each, float(result.frequency[each.head])) for each in top],
            n_top=N_TOP,
            unranked=unranked(result),
        ),
        page.render("sections/head_scores_digest.html.j2", s=words.summary(result, threshold), controls=controls),
    )
