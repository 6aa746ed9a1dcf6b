"""The section of OV tokens: for each head, the tokens that it would write for the most attended tokens."""

from interp.analyses.views.ov_tokens import N_COPIED, OvTokens
from interp.report.page import Page, Section, title_of
from interp.report.read_tokens import query_words, repeated_texts, span_words
from interp.report.sections.dispatch import section

N_READ = 3
"""attended tokens that are listed for each head"""


@section.register(OvTokens)
def _(result: OvTokens, name: str, page: Page) -> Section:
    rows = []
    for head in result.heads:
        read = sorted(result.of(head), key=lambda reading: -reading.attention)[:N_READ]
        copied = f"{result.copying(head):.0%}"
        rows.append({"head": head, "copied": copied, "read": read, "repeated": repeated_texts(read)})
    body = page.render(
        "sections/ov_tokens.html.j2",
        rows=rows, span=span_words(result), query=query_words(result), n_tokens=int((result.ids >= 0).sum()),
        n_read=N_READ, n_copied=N_COPIED,
    )  # fmt: skip
    return Section(title_of(name), body)
