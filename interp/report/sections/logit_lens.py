"""The section of a logit lens: the tokens that heads raise, prompt by prompt."""

from interp import plots
from interp.analyses.views.logit_lens import LogitLens
from interp.report.page import Page, Section, title_of
from interp.report.sections.dispatch import section


@section.register(LogitLens)
def _(result: LogitLens, name: str, page: Page) -> Section:
    drawn = [page.figure(plots.logit_lens(result, number)) for number in range(len(result.labels))]
    note = (
        "Each figure shows the tokens that the output of a head at the last token raises most, read through the "
        "unembedding. Heads that write for later layers raise tokens without a visible meaning."
    )
    return Section(title_of(name), page.render("sections/figures.html.j2", note=note, drawn=drawn))
