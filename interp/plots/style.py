"""What all figures share: colours, text that came from outside made safe, axes and layout."""

import re
from html import escape
from importlib.resources import files
from textwrap import wrap
from typing import Any

BLUE, ORANGE, GREY = "#3b82c4", "#d55e00", "#8a8f98"
# Okabe and Ito's colours, told apart by colour-blind readers
LINES = (ORANGE, BLUE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# functions keep their colour from figure to figure; sinks, of which there are many, a quiet one
COLOURS = {
    "retrieval": ORANGE, "induction": BLUE, "previous_token": "#009e73", "duplicate_token": "#cc79a7",
    "sinks": "#d3bd5c",
}  # fmt: skip
# one hue, lightness falling evenly: reads the same in grey and for colour-blind readers
SCALE = ((0.0, "#f3f6fa"), (0.25, "#c3d9ed"), (0.5, "#7fb0d8"), (0.75, "#3677b0"), (1.0, "#08305f"))
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
# would change or hide the text around them: controls, line separators, marks of writing direction, half characters
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


ABOVE: dict[str, Any] = {
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0.0},
    # room for it between the heading and the plot
    "margin": {"t": 104},
    "title": {"y": 0.985, "yref": "container", "yanchor": "top"},
}
"""layout of a figure whose legend stands above it, to be given after `layout`"""


def visible(text: str) -> str:
    """The text with characters that cannot be seen, or that reorder others, written as symbols or \\u codes."""
    return _UNSEEN.sub(lambda found: _symbol(ord(found[0])), text)


NAMES = {
    "qrhead": "QRHead", "qada": "QAdA", "qk_score": "QK-score", "task_kv": "Task-KV", "duo_gates": "DuoAttention gates",
}  # fmt: skip
"""analyses that are written in their own way"""


def title_of(name: str) -> str:
    """Name of an analysis as a heading: "previous_token" is "Previous token"."""
    if name in NAMES:
        return NAMES[name]
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def colour_of(name: str, place: int) -> str:
    """The colour of an analysis, or of the one at this place."""
    return COLOURS.get(name) or LINES[place % len(LINES)]


def number(value: float) -> str:
    """Two decimals, more for small numbers; "–" for none."""
    if value != value:
        return "–"
    size = abs(value)
    return f"{value:.2f}" if size == 0 or size >= 0.1 else f"{value:.3f}" if size >= 0.001 else f"{value:.1g}"


def safe(text: str) -> str:
    """For plotly, whose texts are a subset of HTML."""
    return escape(visible(text), quote=False)


def lines(text: str, width: int = 32) -> str:
    """`safe`, in lines no longer than a short axis."""
    return "<br>".join(map(safe, wrap(text, width)))


def listed_rows(names: list[str], *columns: list[float]) -> list[list[Any]]:
    """Rows of a table: a name, then numbers to six digits, None for one that is missing."""
    return [
        [name, *(None if value != value else float(f"{value:.6g}") for value in values)]
        for name, *values in zip(names, *columns, strict=True)
    ]


def saving() -> str:
    """JavaScript of every page that saves files: interpSave(name, type, text); interpCsv(rows), without formulas."""
    return files("interp.plots").joinpath("saving.js").read_text(encoding="utf-8")


def embed(text: str) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin another."""
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})


def layout(title: str, said: list[str], height: int) -> dict[str, Any]:
    return {
        "title": {
            "text": safe(title),
            "subtitle": {"text": safe("; ".join(part for part in said if part))},
            "x": 0,
            "xanchor": "left",
            "xref": "paper",
        },
        "height": height,
        "template": "none",
        "font": {"family": _FONT, "size": 12},
        "margin": {"l": 60, "r": 20, "t": 70, "b": 46},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"align": "left", "font": {"family": _FONT, "size": 12}},
        "xaxis": {"automargin": True, "gridcolor": "#e6e9ee", "zerolinecolor": "#cfd4dc"},
        "yaxis": {"automargin": True, "gridcolor": "#e6e9ee", "zerolinecolor": "#cfd4dc"},
    }


def whole(count: int) -> dict[str, Any]:
    """Axis of layers or heads: whole numbers, as many as there is room for."""
    return {"dtick": 1 if count <= 12 else None, "tickangle": 0, "showgrid": False, "zeroline": False}


def _symbol(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"\\u{code:04x}"
