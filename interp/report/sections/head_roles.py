"""The section of roles: the picture of all heads, and the heads of each role."""

from interp import plots
from interp.analyses.views.head_roles import HeadRoles
from interp.report.page import Page, Section, title_of
from interp.report.roles import rows_of
from interp.report.sections.dispatch import section


@section.register(HeadRoles)
def _(result: HeadRoles, name: str, page: Page) -> Section:
    body = page.render("sections/head_roles.html.j2", atlas=page.figure(plots.atlas(result)), roles=rows_of(result))
    return Section(title_of(name), body)
