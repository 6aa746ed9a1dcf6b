"""Plotly figures from results; every text that came from outside is escaped, nothing is loaded from a network."""

from interp.plots.checks import causal, curve
from interp.plots.heads import gains, head_map, positions, scatter, top_heads
from interp.plots.style import number, title_of, visible

__all__ = [
    "causal",
    "curve",
    "gains",
    "head_map",
    "number",
    "positions",
    "scatter",
    "title_of",
    "top_heads",
    "visible",
]
