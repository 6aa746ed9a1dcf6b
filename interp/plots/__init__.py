"""Plotly figures of results; text from outside is escaped, and nothing is loaded from a network.

Every module of this folder is imported, so that the figure of a type of result registers by being here.
"""

from importlib import import_module
from pkgutil import iter_modules

from interp.plots.atlas import atlas, depth
from interp.plots.dispatch import figure
from interp.plots.explorer import Explorer, block_map, explorer
from interp.plots.heads import gains, head_map, p_text, positions, scatter, threshold_curve, top_heads
from interp.plots.logit_lens import logit_lens, ov
from interp.plots.needle_sweep import needle_sweep
from interp.plots.qk_projection import qk_projection
from interp.plots.rankings import rankings
from interp.plots.static import picture, save
from interp.plots.style import colour_of, number, title_of, visible
from interp.plots.token_attention import token_attention
from interp.plots.trials import trials

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")

__all__ = [
    "Explorer",
    "atlas",
    "block_map",
    "colour_of",
    "depth",
    "explorer",
    "figure",
    "gains",
    "head_map",
    "logit_lens",
    "needle_sweep",
    "number",
    "ov",
    "p_text",
    "picture",
    "positions",
    "qk_projection",
    "rankings",
    "save",
    "scatter",
    "threshold_curve",
    "title_of",
    "token_attention",
    "top_heads",
    "trials",
    "visible",
]
