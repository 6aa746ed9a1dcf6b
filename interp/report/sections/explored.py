"""The section of an explored prompt: the explorer."""

from markupsafe import Markup

from interp import plots
from interp.analyses.views.explore import Explored
from interp.report.page import Page, Section, title_of
from interp.report.sections.dispatch import section


@section.register(Explored)
def _(result: Explored, name: str, page: Page) -> Section:
    explorer = plots.explorer(result)
    page.use(explorer.style(), explorer.script())
    body = page.render(
        "sections/explored.html.j2",
        n_tokens=len(result.tokens), panel=Markup(explorer.panel()), data=Markup(explorer.data()),
    )  # fmt: skip
    return Section(title_of(name), body)
