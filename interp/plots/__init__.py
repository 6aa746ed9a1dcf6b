"""Plotly figures from results; every text that came from outside is escaped, nothing is loaded from a network."""

from interp.plots.atlas import atlas, depth
from interp.plots.checks import causal, curve
from interp.plots.explorer import Explorer, explorer
from interp.plots.heads import gains, head_map, positions, scatter, top_heads
from interp.plots.joint import joint
from interp.plots.keys import key_curve, rankings
from interp.plots.static import picture, save
from interp.plots.style import colour_of, number, title_of, visible
from interp.plots.vocabulary import ov, vocabulary

__all__ = [
    "Explorer",
    "atlas",
    "causal",
    "colour_of",
    "curve",
    "depth",
    "explorer",
    "gains",
    "head_map",
    "joint",
    "key_curve",
    "number",
    "ov",
    "picture",
    "positions",
    "rankings",
    "save",
    "scatter",
    "title_of",
    "top_heads",
    "visible",
    "vocabulary",
]
