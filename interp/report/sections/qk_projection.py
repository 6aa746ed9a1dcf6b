"""The section of projected queries and keys, head by head."""

from interp import plots
from interp.analyses.views.qk_projection import QKProjection
from interp.report.page import Page, Section, title_of
from interp.report.sections.dispatch import section


@section.register(QKProjection)
def _(result: QKProjection, name: str, page: Page) -> Section:
    drawn = [page.figure(plots.qk_projection(result, head, color="position")) for head in result.heads]
    note = (
        f"Queries and keys of one head in one plane, over {len(result.labels)} prompts, darker toward the end of a "
        "prompt. A query attends to keys near it, as far as two dimensions can show; the line above each figure states "
        "how far."
    )
    return Section(title_of(name), page.render("sections/figures.html.j2", note=note, drawn=drawn))
