"""Plotly figures from results; every text that came from outside is escaped, nothing is loaded from a network."""

from interp.plots.atlas import atlas, depth
from interp.plots.checks import causal, curve
from interp.plots.explorer import Explorer, explorer
from interp.plots.heads import gains, head_map, positions, scatter, top_heads
from interp.plots.kv import key_curve, rankings
from interp.plots.logit_lens import logit_lens, ov
from interp.plots.qk_projection import qk_projection
from interp.plots.static import picture, save
from interp.plots.style import colour_of, number, title_of, visible

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
    "key_curve",
    "logit_lens",
    "number",
    "ov",
    "picture",
    "positions",
    "qk_projection",
    "rankings",
    "save",
    "scatter",
    "title_of",
    "top_heads",
    "visible",
]
