"""Attention on a text, made ready for the page: runs of tokens with their marks, and far-away text left out."""

import math
from dataclasses import dataclass
from typing import Any

from interp.errors import RunError
from interp.findings import TokenView

# tokens shown of a long text: its begin, its end, around each mark, around the most attended tokens of each head
MOST, BEGIN, END, AROUND, NEAR, STRONGEST = 2400, 150, 300, 300, 6, 8


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens with the same marks, or a gap."""

    marks: tuple[str, ...]
    tokens: tuple[tuple[int, str, float], ...]
    """position, text, strength of the first head's colour from 0 to 1"""
    gap: int = 0
    """tokens left out here"""


@dataclass(frozen=True)
class TokenRow:
    """A TokenView as the template takes it."""

    title: str
    written: str
    heads: tuple[str, ...]
    runs: tuple[Run, ...]
    weights: list[list[float]]
    """[head][token shown]"""
    table: list[dict[str, Any]]
    """for each head its attention on each mark and its most attended tokens"""
    marks: tuple[str, ...]
    tokens: int
    left_out: int


def show(view: TokenView) -> TokenRow:
    """Raises RunError where the weights do not fit the tokens."""
    n = len(view.tokens)
    for head, weights in view.weights.items():
        if len(weights) != n:
            raise RunError(
                f"the view '{view.title}' has {n} tokens but {len(weights)} weights for {head}; give one a token."
            )
    rows = {head: [0.0 if math.isnan(w) else float(w) for w in row] for head, row in view.weights.items()}
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
        written=view.written,
        heads=tuple(rows),
        runs=tuple(runs),
        weights=[[round(row[i], 5) for i in kept] for row in rows.values()],
        table=[_row(view, head, row) for head, row in rows.items()],
        marks=tuple(view.marks),
        tokens=n,
        left_out=n - len(kept),
    )


def _row(view: TokenView, head: str, row: list[float]) -> dict[str, Any]:
    return {
        "head": head,
        "on": [sum(sum(row[a:b]) for a, b in ranges) for ranges in view.marks.values()],
        "most": [(i, view.tokens[i], row[i]) for i in _strongest(row, 3)],
    }


def _strongest(row: list[float], count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: -row[i])[:count]


def _kept(view: TokenView, rows: list[list[float]]) -> list[int]:
    n = len(view.tokens)
    if n <= MOST:
        return list(range(n))
    around = [(0, BEGIN), (n - END, n)]
    edges = [edge for ranges in view.marks.values() for span in ranges for edge in span]
    around += [(edge - AROUND, edge + AROUND) for edge in edges]
    around += [(i - NEAR, i + NEAR + 1) for row in rows for i in _strongest(row, STRONGEST)]
    return sorted({i for start, stop in around for i in range(max(start, 0), min(stop, n))})
