"""Static pictures of figures without a browser: matplotlib draws the marks that interp.plots uses."""

import re
from base64 import b64decode
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import RunError, UsageError
from interp.hooks.writer import check_writable, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture
    from plotly.graph_objects import Figure

PIXELS = 96
"""pixels of plotly's layout in an inch"""
FORMATS = (".png", ".svg", ".pdf")
_MARKS = {"circle": "o", "square": "s", "diamond": "D", "x": "x", "cross": "P", "triangle-up": "^"}
_DASHES = {"dot": ":", "dash": "--", "dashdot": "-."}


def save(figure: "Figure", path: str | Path, *, width: int = 1000, scale: float = 2.0) -> Path:
    """Write a figure to a file.

    A .html file opens offline with hover and zoom. A .png, .svg or .pdf file needs no browser.

    Args:
        figure: A plotly figure of interp.plots.
        path: File name, whose ending chooses the format.
        width: Width in pixels; the height is that of the figure.
        scale: Factor for the pixels of a .png file.

    Returns:
        The path.

    Raises:
        UsageError: For another ending.
        RunError: Where the file cannot be written.

    Examples:
        >>> interp.plots.save(interp.plots.head_map(scores), folder / "map.svg").name
        'map.svg'
    """
    path = Path(path)
    check_writable(path, RunError)
    kind = path.suffix.lower()
    if kind == ".html":
        content = str(figure.to_html(include_plotlyjs=True, config={"displaylogo": False})).encode()
    elif kind in FORMATS:
        content = _bytes(picture(figure, width=width), kind[1:], scale)
    else:
        raise UsageError(f"{path.name} ends in {kind or 'nothing'}; choose from .html, {', '.join(FORMATS)}.")
    return write_atomic(path, content, RunError)


def picture(figure: "Figure", *, width: int = 1000) -> "Picture":
    """Redraw a figure with matplotlib from the same data.

    Heat maps, lines, points with intervals, text, axes and legends are drawn.

    Args:
        figure: A plotly figure of interp.plots.
        width: Width in pixels.

    Returns:
        Figure: A matplotlib figure.

    Raises:
        UsageError: For a kind of mark that interp.plots does not use.

    Limits:
        Does not show hover texts.
    """
    from matplotlib.figure import Figure as Picture

    # to_dict would pack arrays for JavaScript
    layout: dict[str, Any] = figure.layout.to_plotly_json()
    height = int(layout.get("height") or 420)
    made = Picture(figsize=(width / PIXELS, height / PIXELS), dpi=PIXELS, layout="constrained")
    axes = made.add_subplot()
    named = False
    for trace in (each.to_plotly_json() for each in figure.data):
        kind = trace.get("type", "scatter")
        if kind == "heatmap":
            _heatmap(made, axes, trace, layout)
        elif kind == "scatter":
            _scatter(axes, trace)
            named |= bool(trace.get("name")) and trace.get("showlegend") is not False
        else:
            raise UsageError(f"a plotly trace of type {kind!r} has no static form; save this figure as .html.")
    for shape in layout.get("shapes") or ():
        if shape.get("type") == "line" and shape.get("x0") == shape.get("x1"):
            axes.axvline(shape["x0"], **_line(shape.get("line") or {}))
    _axis(axes, "x", layout.get("xaxis") or {})
    _axis(axes, "y", layout.get("yaxis") or {})
    _title(axes, layout.get("title") or {})
    if named and layout.get("showlegend") is not False:
        longest = max(map(len, axes.get_legend_handles_labels()[1]), default=1)
        columns = max(1, min(4, width // (6 * longest + 50)))
        made.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=8)
    return made


def _bytes(made: "Picture", kind: str, scale: float) -> bytes:
    from io import BytesIO

    import matplotlib

    held = BytesIO()
    # text stays text, and the same figure gives the same file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "interp"}):
        made.savefig(held, format=kind, dpi=PIXELS * scale, metadata={} if kind == "png" else _UNDATED[kind])
    return held.getvalue()


_UNDATED: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def _heatmap(made: "Picture", axes: Any, trace: dict[str, Any], layout: dict[str, Any]) -> None:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    shared = layout.get(trace["coloraxis"]) or {} if trace.get("coloraxis") else trace
    low, high = (shared.get(f"{'c' if trace.get('coloraxis') else 'z'}{end}") for end in ("min", "max"))
    z = _array(trace["z"])
    given = shared.get("colorscale") or trace.get("colorscale")
    stops = [(float(at), _colour(colour)) for at, colour in given or ()]
    colours = LinearSegmentedColormap.from_list("figure", stops, N=1024)
    xs, ys = (_array(trace[k]) if trace.get(k) is not None else np.arange(n, dtype=float)
              for k, n in (("x", z.shape[1]), ("y", z.shape[0])))  # fmt: skip
    edge = {"edgecolors": "white", "linewidth": 0.8} if trace.get("xgap") else {}
    drawn = axes.pcolormesh(xs, ys, np.ma.masked_invalid(z), cmap=colours, vmin=low, vmax=high, **edge)
    if trace.get("texttemplate"):
        for y, row in zip(ys, trace["text"], strict=True):
            for x, text in zip(xs, row, strict=True):
                axes.text(x, y, _plain(text), ha="center", va="center", fontsize=6.5, parse_math=False)
    if trace.get("showscale", True) is not False:
        made.colorbar(drawn, ax=axes, pad=0.01, aspect=30).outline.set_visible(False)


def _scatter(axes: Any, trace: dict[str, Any]) -> None:
    import numpy as np

    x, y = (_array(trace.get(k) if trace.get(k) is not None else []) for k in "xy")
    mode, marker, line = trace.get("mode") or "lines", trace.get("marker") or {}, trace.get("line") or {}
    label = _plain(trace.get("name") or "") if trace.get("showlegend") is not False else ""
    labelled = {"label": label} if label else {}
    colours = marker.get("color")
    one = colours if isinstance(colours, str) else line.get("color")
    for axis in "xy":
        bars = trace.get(f"error_{axis}") or {}
        if bars.get("array") is not None:
            up = np.nan_to_num(_array(bars["array"]))
            down = np.nan_to_num(_array(bars.get("arrayminus", up)))
            ends = {f"{axis}err": np.abs([down, up])}
            colour = _colour(bars.get("color") or one or "#000000")
            axes.errorbar(x, y, fmt="none", ecolor=colour, elinewidth=1.2, capsize=2, **ends)
    if trace.get("fill") == "toself":
        axes.fill(x, y, color=_colour(trace["fillcolor"]), linewidth=0)
    elif "lines" in mode:
        axes.plot(x, y, **_line(line), **labelled)
        labelled = {}
    if "markers" in mode:
        size = marker.get("size") or 6
        given = [_colour(c) for c in colours] if isinstance(colours, list | tuple) else _colour(one or "#3b82c4")
        shape = marker.get("symbol") or "circle"
        kinds = [shape] if isinstance(shape, str) else list(shape)
        for kind in dict.fromkeys(kinds):
            at = np.array([k == kind for k in kinds]) if len(kinds) > 1 else np.ones(len(x), dtype=bool)
            those = [c for c, here in zip(given, at, strict=True) if here] if isinstance(given, list) else given
            axes.scatter(x[at], y[at], s=(0.75 * size) ** 2, color=those, alpha=marker.get("opacity"),
                         marker=_MARKS.get(kind, "o"), linewidths=0, zorder=3, **labelled)  # fmt: skip
            labelled = {}
    if "text" in mode and isinstance(trace.get("text"), list | tuple):
        for at_x, at_y, text in zip(x, y, trace["text"], strict=True):
            if text:
                axes.annotate(_plain(text), (at_x, at_y), (0, 5), textcoords="offset points", ha="center", fontsize=7,
                              parse_math=False)  # fmt: skip


def _array(values: Any) -> Any:
    """Numbers, unpacked where plotly packed them for JavaScript."""
    import numpy as np

    if isinstance(values, Mapping):
        shape = [int(part) for part in str(values.get("shape", "-1")).split(",")]
        return np.frombuffer(b64decode(values["bdata"]), np.dtype(values["dtype"])).reshape(shape).astype(float)
    return np.asarray(values, dtype=float)


def _line(line: dict[str, Any]) -> dict[str, Any]:
    dash = _DASHES.get(str(line.get("dash")), "-")
    return {"color": _colour(line.get("color") or "#3b82c4"), "linewidth": line.get("width") or 1.5, "linestyle": dash}


def _axis(axes: Any, letter: str, given: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis = getattr(axes, f"{letter}axis")
    title = given.get("title") or {}
    getattr(axes, f"set_{letter}label")(_plain(title.get("text") or ""), fontsize=9, parse_math=False)
    if given.get("type") == "log":
        getattr(axes, f"set_{letter}scale")("log", base=2)
    if given.get("range") is not None:
        getattr(axes, f"set_{letter}lim")(*given["range"])
    elif given.get("autorange") == "reversed":
        axis.set_inverted(True)
    elif given.get("rangemode") == "tozero":
        getattr(axes, f"set_{letter}lim")(**{"left" if letter == "x" else "bottom": 0})
    if given.get("tickvals") is not None:
        axis.set_ticks(list(given["tickvals"]), [_plain(t) for t in given["ticktext"]], parse_math=False)
    elif given.get("dtick") == 1:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    if "%" in str(given.get("tickformat") or ""):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if given.get("showticklabels") is False:
        axis.set_ticks([])
    if given.get("showgrid") is not False:
        axes.grid(True, axis=letter, color="#e6e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _title(axes: Any, title: dict[str, Any]) -> None:
    import textwrap

    below = _plain((title.get("subtitle") or {}).get("text") or "")
    lines = [_plain(title.get("text") or ""), *textwrap.wrap(below, 110)]
    axes.set_title("\n".join(line for line in lines if line), loc="left", fontsize=10, parse_math=False)


def _plain(text: Any) -> str:
    """The text in plotly's subset of HTML."""
    return unescape(re.sub(r"<[^<>]*>", "", str(text).replace("<br>", "\n")))


def _colour(text: str) -> Any:
    found = re.fullmatch(r"rgba?\(([\d.]+),\s*([\d.]+),\s*([\d.]+)(?:,\s*([\d.]+))?\)", str(text))
    if found is None:
        return text
    red, green, blue = (float(part) / 255 for part in found.groups()[:3])
    return red, green, blue, float(found[4] or 1.0)
