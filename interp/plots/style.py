"""Colours, axes and layout that all figures share, and the escaping of text from outside."""

from html import escape
from importlib.resources import files
from textwrap import wrap
from typing import Any

from interp.analyses import registry
from interp.hooks.visible import visible

BLUE, ORANGE, GREY = "#3b82c4", "#d55e00", "#8a8f98"
# Okabe and Ito's colours, which colour-blind readers can separate
LINES = (ORANGE, BLUE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# one hue, lightness falling evenly: reads the same in grey and for colour-blind readers
SCALE = ((0.0, "#f3f6fa"), (0.25, "#c3d9ed"), (0.5, "#7fb0d8"), (0.75, "#3677b0"), (1.0, "#08305f"))
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


ABOVE: dict[str, Any] = {
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0.0},
    # room for it between the heading and the plot
    "margin": {"t": 104},
    "title": {"y": 0.985, "yref": "container", "yanchor": "top"},
}
"""layout of a figure with its legend above the plot, applied after `layout`"""


def title_of(name: str) -> str:
    """The title of an analysis: the declared one, else its name as a heading, such as "Previous token".

    Args:
        name: Name of an analysis, or any other name.

    Returns:
        The title.

    Examples:
        >>> interp.plots.title_of("my_method")
        'My method'
    """
    entry = registry.find(name)
    if entry is not None and entry.name == name:
        return entry.title
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def colour_of(name: str, place: int) -> str:
    """The declared colour of an analysis, else the colour of a place in a list.

    Args:
        name: Name of an analysis.
        place: Its place among those that are drawn.

    Returns:
        The colour, as #rrggbb.
    """
    entry = registry.find(name)
    return LINES[place % len(LINES)] if entry is None or entry.color is None else entry.color


def number(value: float) -> str:
    """A number as text: two decimals, more for small numbers, and "–" for NaN.

    Args:
        value: The number.

    Returns:
        The text.
    """
    if value != value:
        return "–"
    size = abs(value)
    return f"{value:.2f}" if size == 0 or size >= 0.1 else f"{value:.3f}" if size >= 0.001 else f"{value:.1g}"


def safe(text: str) -> str:
    """Escape a text for plotly, which reads a subset of HTML.

    Args:
        text: Text from outside.
    """
    return escape(visible(text), quote=False)


def lines(text: str, width: int = 32) -> str:
    """Escape a text, and break it into lines that fit a short axis.

    Args:
        text: Text from outside.
        width: Largest number of characters in a line.
    """
    return "<br>".join(map(safe, wrap(text, width)))


def listed_rows(names: list[str], *columns: list[float]) -> list[list[Any]]:
    """Rows of a table: a name, then numbers with six digits, None for NaN.

    Args:
        names: One for each row.
        columns: Numbers of the rows.
    """
    return [
        [name, *(None if value != value else float(f"{value:.6g}") for value in values)]
        for name, *values in zip(names, *columns, strict=True)
    ]


def saving() -> str:
    """JavaScript of pages that save files: `interpSave(name, type, text)`, and `interpCsv(rows)` without formulas."""
    return files("interp.plots").joinpath("saving.js").read_text(encoding="utf-8")


def embed(text: str) -> str:
    """Escape JSON for a script element, so that it cannot end the element or begin another.

    Args:
        text: JSON.
    """
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})


def layout(title: str, notes: list[str], height: int) -> dict[str, Any]:
    """The layout of a figure.

    Args:
        title: Heading, escaped here.
        notes: Parts of the subtitle, escaped here; empty ones are left out.
        height: Height in pixels.
    """
    return {
        "title": {
            "text": safe(title),
            "subtitle": {"text": safe("; ".join(part for part in notes if part))},
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
    """An axis of layers or heads: whole numbers, as many as fit.

    Args:
        count: Number of layers or heads.
    """
    return {"dtick": 1 if count <= 12 else None, "tickangle": 0, "showgrid": False, "zeroline": False}
