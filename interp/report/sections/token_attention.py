"""The section of attention on a text: runs of tokens with their marks, with distant text left out."""

import json
import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from interp.analyses.views.token_attention import TokenAttention
from interp.plots.style import embed
from interp.report.page import Page, Section, title_of
from interp.report.sections.dispatch import section

MAX_TOKENS = 2400
"""tokens of a text that is shown whole"""
N_FIRST, N_LAST, N_AROUND = 150, 300, 300
"""tokens of a longer text that are shown: the first, the last, and those around each mark"""
N_STRONGEST, N_NEAR = 8, 6
"""most attended tokens of each head that are shown, and tokens on each side of them"""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens with the same marks, or a gap."""

    marks: tuple[str, ...]
    tokens: tuple[tuple[int, str, float], ...]
    """position, text, and strength of the first head's colour from 0 to 1"""
    gap: int = 0
    """number of tokens that are left out here"""


@dataclass(frozen=True)
class TokenRow:
    """Attention on a text, as the template takes it."""

    title: str
    reply: str
    heads: tuple[str, ...]
    runs: tuple[Run, ...]
    weights: list[list[float]]
    """weight of each head on each shown token"""
    table: list[dict[str, Any]]
    """for each head, its attention on each mark and its most attended tokens"""
    marks: tuple[str, ...]
    tokens: int
    left_out: int


@section.register(TokenAttention)
def _(result: TokenAttention, name: str, page: Page) -> Section:
    view = token_row(result)
    body = page.render("sections/token_attention.html.j2", view=view, weights=Markup(embed(json.dumps(view.weights))))
    return Section(title_of(name), body)


def token_row(view: TokenAttention) -> TokenRow:
    """Prepare attention on a text for the page.

    Args:
        view: The attention.
    """
    n = len(view.tokens)
    rows = {
        head: [0.0 if math.isnan(weight) else weight for weight in row]
        for head, row in zip(view.heads, view.weights.tolist(), strict=True)
    }
    kept = _kept(view, list(rows.values()))
    first = next(iter(rows.values()), [0.0] * n)
    largest = max(first, default=0.0) or 1.0
    runs: list[Run] = []
    before = -1
    for i in kept:
        if i > before + 1:
            runs.append(Run((), (), gap=i - before - 1))
        before = i
        marks = tuple(name for name, ranges in view.marks.items() if any(a <= i < b for a, b in ranges))
        token = (i, view.tokens[i], round(math.sqrt(max(first[i], 0.0) / largest), 3))
        if runs and not runs[-1].gap and runs[-1].marks == marks:
            runs[-1] = Run(marks, (*runs[-1].tokens, token))
        else:
            runs.append(Run(marks, (token,)))
    if before + 1 < n:
        runs.append(Run((), (), gap=n - before - 1))
    return TokenRow(
        title=view.title,
        reply=view.reply,
        heads=tuple(rows),
        runs=tuple(runs),
        weights=[[round(row[i], 5) for i in kept] for row in rows.values()],
        table=[_row(view, head, row) for head, row in rows.items()],
        marks=tuple(view.marks),
        tokens=n,
        left_out=n - len(kept),
    )


def _row(view: TokenAttention, head: str, row: list[float]) -> dict[str, Any]:
    return {
        "head": head,
        "on": [sum(sum(row[a:b]) for a, b in ranges) for ranges in view.marks.values()],
        "most": [(i, view.tokens[i], row[i]) for i in _strongest(row, 3)],
    }


def _strongest(row: list[float], count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: -row[i])[:count]


def _kept(view: TokenAttention, rows: list[list[float]]) -> list[int]:
    n = len(view.tokens)
    if n <= MAX_TOKENS:
        return list(range(n))
    around = [(0, N_FIRST), (n - N_LAST, n)]
    edges = [edge for ranges in view.marks.values() for span in ranges for edge in span]
    around += [(edge - N_AROUND, edge + N_AROUND) for edge in edges]
    around += [(i - N_NEAR, i + N_NEAR + 1) for row in rows for i in _strongest(row, N_STRONGEST)]
    return sorted({i for start, stop in around for i in range(max(start, 0), min(stop, n))})
