"""Plotly figures from results; every text that came from outside is escaped, nothing is loaded from a network."""

import re
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.analyses.causal import CausalCheck
from interp.analyses.curve import Curve
from interp.analyses.scores import HeadScores
from interp.hooks.heads import HeadSet
from interp.kernels.errors import UsageError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BLUE, ORANGE, GREY = "#3b82c4", "#d55e00", "#8a8f98"
# Okabe and Ito's colours, told apart by colour-blind readers
LINES = (ORANGE, BLUE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# one hue, lightness falling evenly: reads the same in grey and for colour-blind readers
SCALE = ((0.0, "#f3f6fa"), (0.25, "#c3d9ed"), (0.5, "#7fb0d8"), (0.75, "#3677b0"), (1.0, "#08305f"))
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
# would change or hide the text around them: controls, line separators, marks of writing direction, half characters
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with characters that cannot be seen, or that reorder others, written as symbols or \\u codes."""
    return _UNSEEN.sub(lambda found: _symbol(ord(found[0])), text)


def title_of(name: str) -> str:
    """Name of an analysis as a heading: "previous_token" is "Previous token"."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def number(value: float) -> str:
    """Two decimals, more for small numbers; "–" for none."""
    if value != value:
        return "–"
    size = abs(value)
    return f"{value:.2f}" if size == 0 or size >= 0.1 else f"{value:.3f}" if size >= 0.001 else f"{value:.1g}"


def head_map(scores: HeadScores) -> "Figure":
    """Every head of the model: layers from left to right, heads from top to bottom, the score as lightness; purple up
    and orange down where scores go below zero.

    Heads above the threshold are outlined; a head without a score is a gap.
    """
    import plotly.graph_objects as go

    values, known = scores.values, scores.values[~scores.values.isnan()]
    low, high = (min(0.0, float(known.min())), float(known.max())) if len(known) else (0.0, 1.0)
    # what goes both ways has its nothing in the middle
    signed = low < -0.1 * high
    if signed:
        low, high = -max(-low, high), max(-low, high)
    about = _about_heads(scores)
    text = [[about[layer][head] for layer in range(scores.layers)] for head in range(scores.n_heads)]
    figure = go.Figure(
        go.Heatmap(
            z=values.T.contiguous().numpy(), text=text, hovertemplate="%{text}<extra></extra>", coloraxis="coloraxis",
            xgap=1, ygap=1,
        )
    )  # fmt: skip
    said = [scores.unit, f"mean over {scores.counted} of {len(scores.per_prompt)} prompts"]
    if scores.threshold is not None:
        above = values > scores.threshold
        xs, ys = _outline(above)
        figure.add_scatter(
            x=xs, y=ys, mode="lines", line={"color": ORANGE, "width": 1.5}, hoverinfo="skip", showlegend=False
        )
        said.append(f"outlined: above {scores.threshold:g} ({int(above.sum())} of {len(scores)} heads)")
    cell = 24 if scores.n_heads <= 12 else 16 if scores.n_heads <= 40 else 10
    figure.update_layout(
        **_layout(f"{title_of(scores.name)}: score of each head", said, cell * scores.n_heads + 120),
        coloraxis={
            "colorscale": "PuOr" if signed else SCALE, "cmin": low, "cmax": high if high > low else low + 1,
            "colorbar": {"thickness": 10, "outlinewidth": 0, "nticks": 5},
        },
    )  # fmt: skip
    figure.update_xaxes(title="layer", range=[-0.6, scores.layers - 0.4], **_whole(scores.layers))
    figure.update_yaxes(title="head", range=[scores.n_heads - 0.4, -0.6], **_whole(scores.n_heads))
    return figure


def gains(scores: HeadScores) -> "Figure":
    """`head_map` of a steering profile: what each head gains when it alone is steered, purple up and orange down."""
    figure = head_map(scores)
    known = scores.values[~scores.values.isnan()].abs()
    most = float(known.max()) if len(known) and known.max() > 0 else 1.0
    layout: Any = figure.layout
    layout.coloraxis.update(colorscale="PuOr", cmin=-most, cmax=most)
    layout.title.text = "Gain of each head, steered alone"
    return figure


def top_heads(scores: HeadScores, k: int = 10) -> "Figure":
    """The k highest scored heads, best on top, with their 95% intervals over prompts and the threshold."""
    import plotly.graph_objects as go

    heads = scores.top(k)
    chosen = _at(scores.values, heads)
    ends = [_at(end, heads) for end in (scores.low, scores.high)]
    about = _about_heads(scores)
    figure = go.Figure(
        go.Scatter(
            x=chosen.numpy(),
            y=list(range(len(heads))),
            mode="markers",
            marker={"size": 9, "color": BLUE},
            error_x={
                "array": (ends[1] - chosen).nan_to_num(0.0).numpy(),
                "arrayminus": (chosen - ends[0]).nan_to_num(0.0).numpy(),
                "color": BLUE,
                "thickness": 1.5,
                "width": 4,
            },
            text=[about[head.layer][head.head] for head in heads],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
    )
    if scores.threshold is not None:
        figure.add_vline(x=scores.threshold, line={"color": ORANGE, "width": 1.5, "dash": "dot"})
    said = ["bars: 95% interval over prompts"]
    if scores.threshold is not None:
        said.append(f"dotted: threshold {scores.threshold:g}")
    figure.update_layout(**_layout(f"{title_of(scores.name)}: top {len(heads)} heads", said, 26 * len(heads) + 120))
    figure.update_xaxes(title=_safe(scores.unit), rangemode="tozero")
    figure.update_yaxes(
        tickvals=list(range(len(heads))),
        ticktext=[f"{head}  {number(value)}" for head, value in zip(heads, chosen.tolist(), strict=True)],
        range=[len(heads) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    return figure


def scatter(one: HeadScores, other: HeadScores, k: int = 10) -> "Figure":
    """Each head by its two scores; heads in the top k of both are orange. Raises as `HeadScores.compare`."""
    import plotly.graph_objects as go

    agreed = one.compare(other, k)
    heads = [head for head in one if not (one.values[head].isnan() or other.values[head].isnan())]
    tops = [table.top(k) for table in (one, other)]
    both = set(tops[0]) & set(tops[1])
    named = both | set(tops[0][:3]) | set(tops[1][:3])
    figure = go.Figure()
    for label, color, chosen in (
        ("other heads", BLUE, [head for head in heads if head not in both]),
        (f"in both top {k}", ORANGE, [head for head in heads if head in both]),
    ):
        if not chosen:
            continue
        chosen.sort(key=lambda head: float(one.values[head]))
        figure.add_scatter(
            x=_at(one.values, chosen).numpy(),
            y=_at(other.values, chosen).numpy(),
            mode="markers+text",
            name=label,
            marker={"size": 7, "color": color, "opacity": 0.75},
            text=[str(head) if head in named else "" for head in chosen],
            # neighbours above and below in turn, so that they do not cover each other
            textposition=[("top center", "bottom center")[i % 2] for i in range(len(chosen))],
            textfont={"size": 10},
            customdata=[str(head) for head in chosen],
            hovertemplate="%{customdata}<br>%{x:.3f}, %{y:.3f}<extra></extra>",
        )
    said = [
        f"Spearman {number(agreed.spearman)}",
        f"{agreed.overlap} of the top {k} shared ({number(agreed.expected_overlap)} expected by chance, "
        f"p = {agreed.p_overlap:.2g})",
    ]
    figure.update_layout(**_layout(f"{title_of(one.name)} against {title_of(other.name).lower()}", said, 460))
    figure.update_layout(legend=_LEGEND)
    figure.update_xaxes(title=_safe(f"{title_of(one.name)}: {one.unit}"))
    figure.update_yaxes(title=_safe(f"{title_of(other.name)}: {other.unit}"))
    return figure


def causal(check: CausalCheck) -> "Figure":
    """Accuracy of each group of conditions with its 95% interval, and each draw of heads as a dot of its own."""
    import plotly.graph_objects as go

    means, lows, highs, ticks, about = [], [], [], [], []
    dots: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
    for row, group in enumerate(check.groups):
        mean, low, high = check.group(group)
        outcomes = [outcome for outcome in check.outcomes if outcome.condition.group == group]
        means.append(mean)
        lows.append(mean - low)
        highs.append(high - mean)
        size = len(outcomes[0].condition.heads)
        label = f"{group} {size}" if group in ("top", "steered") else group
        drawn = f" ({len(outcomes)} draws)" if len(outcomes) > 1 else ""
        ticks.append(f"{_safe(label)}<br>{mean:.0%}{drawn}")
        about.append(f"{_safe(label)}<br>{mean:.1%} [{low:.1%}, {high:.1%}]")
        for i, outcome in enumerate(outcomes if len(outcomes) > 1 else ()):
            dots["x"].append(outcome.accuracy)
            dots["y"].append(row + 0.18 + 0.14 * i / max(len(outcomes) - 1, 1))
            right = f"{sum(outcome.verdicts)} of {len(outcome.verdicts)} right"
            dots["text"].append(f"{_safe(outcome.condition.name)}: {right}<br>{_listed(outcome.condition.heads)}")
    colours = [ORANGE if group in ("top", "steered") else BLUE for group in check.groups]
    figure = go.Figure()
    figure.add_scatter(
        x=means, y=list(range(len(means))), mode="markers", name="group", text=about,
        marker={"size": 12, "symbol": "diamond", "color": colours},
        error_x={"array": highs, "arrayminus": lows, "color": GREY, "thickness": 1.5, "width": 5},
        hovertemplate="%{text}<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.add_scatter(
        **dots, mode="markers", name="draw", marker={"size": 7, "color": GREY, "opacity": 0.8},
        hovertemplate="%{text}<extra></extra>", showlegend=False,
    )  # fmt: skip
    n = len(check.outcomes[0].verdicts)
    said = [f"{n} prompts", "bars: 95% interval over prompts and draws", "small dots: single draws"]
    steered = "steered" in check.groups
    title = f"Answers under {_safe(check.kind)}" if steered else f"Answers with heads taken out ({check.kind} ablation)"
    figure.update_layout(**_layout(title, said, 66 * len(means) + 120))
    figure.update_xaxes(title="prompts answered", range=[-0.03, 1.03], tickformat=".0%", dtick=0.25)
    figure.update_yaxes(
        tickvals=list(range(len(means))), ticktext=ticks, range=[len(means) - 0.4, -0.5], showgrid=False, zeroline=False
    )
    return figure


def curve(points: Curve, measure: str) -> "Figure":
    """A measure against the number of heads taken out, a line for each ranking and for chance, with 95% intervals."""
    import plotly.graph_objects as go

    base = points.at("as loaded", 0, measure)
    figure = go.Figure()
    names = [name for name in points.rankings if name != "as loaded"]
    chance = {"random": ("dot", GREY), "random by layer": ("dash", GREY)}
    colours = iter(LINES)
    for name in names:
        dash, colour = chance.get(name) or ("solid", next(colours))
        sizes = points.sizes(name)
        rows = [base, *(points.at(name, size, measure) for size in sizes)]
        means = [mean for mean, _, _ in rows]
        figure.add_scatter(
            x=[0, *sizes], y=means, mode="lines+markers", name=_safe(name),
            line={"color": colour, "dash": dash, "width": 2}, marker={"size": 6},
            error_y={
                "array": [high - mean for mean, _, high in rows], "arrayminus": [mean - low for mean, low, _ in rows],
                "color": colour, "thickness": 1, "width": 3,
            },
            text=[f"{_safe(name)}, {size} heads<br>{mean:.3f} [{low:.3f}, {high:.3f}]"
                  for size, (mean, low, high) in zip([0, *sizes], rows, strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    said = [f"{len(points.points[0].values[measure])} prompts", "bars: 95% interval over prompts and draws"]
    figure.update_layout(**_layout(f"{title_of(measure)}, heads taken out ({points.kind} ablation)", said, 380))
    figure.update_layout(legend=_LEGEND)
    figure.update_xaxes(title="heads taken out")
    figure.update_yaxes(title=_safe(measure), rangemode="tozero")
    return figure


def positions(scores: HeadScores, k: int = 5) -> "Figure":
    """Mean attention that each position receives, in the top k heads and over all heads; for `identify.sinks`."""
    import plotly.graph_objects as go

    if "positions" not in scores.extras:
        raise UsageError(f"scores '{scores.name}' hold no attention by position; give the scores of identify.sinks.")
    received = scores.extras["positions"].float().nanmean(0)
    heads = scores.top(k)
    lines = [(str(head), received[head], LINES[i % len(LINES)], 1.8) for i, head in enumerate(heads)]
    lines.append(("all heads", received.flatten(0, 1).nanmean(0), GREY, 4.0))
    figure = go.Figure()
    for name, line, color, width in lines:
        figure.add_scatter(
            x=list(range(len(line))),
            y=line.numpy(),
            mode="lines+markers",
            name=name,
            marker={"size": 4, "color": color},
            line={"width": width, "color": color},
            hovertemplate=f"{name}<br>position %{{x}}: %{{y:.3f}}<extra></extra>",
        )
    said = ["mean over the queries that see the position, and over prompts", "0 is the first token"]
    figure.update_layout(**_layout(f"{title_of(scores.name)}: attention by position", said, 360))
    # within the axes: past the first positions the lines lie low
    figure.update_layout(legend={"x": 1, "xanchor": "right", "y": 1, "yanchor": "top", "bgcolor": "rgba(0,0,0,0)"})
    figure.update_xaxes(title="position of the key")
    figure.update_yaxes(title="attention received", rangemode="tozero")
    return figure


_LEGEND = {"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0.0}


def _symbol(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"\\u{code:04x}"


def _safe(text: str) -> str:
    """For plotly, whose texts are a subset of HTML."""
    return escape(visible(text), quote=False)


def _layout(title: str, said: list[str], height: int) -> dict[str, Any]:
    return {
        "title": {
            "text": _safe(title),
            "subtitle": {"text": _safe("; ".join(part for part in said if part))},
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


def _about_heads(scores: HeadScores) -> list[list[str]]:
    """What the pointer shows for each head, [l][h]."""
    tables = [table.tolist() for table in (scores.values, scores.low, scores.high, scores.frequency)]
    return [
        [
            _about(f"L{layer}H{head}", *(table[layer][head] for table in tables)) for head in range(scores.n_heads)
        ]
        for layer in range(scores.layers)
    ]  # fmt: skip


def _about(name: str, value: float, low: float, high: float, frequency: float) -> str:
    if value != value:
        return f"{name}<br>no prompt counts"
    interval = f" [{low:.3f}, {high:.3f}]" if low == low else ""
    return f"{name}<br>{value:.3f}{interval}<br>above 0 in {frequency:.0%} of prompts"


def _at(table: Tensor, heads: Any) -> Tensor:
    return torch.stack([table[head] for head in heads]) if heads else table.new_zeros(0)


def _outline(inside: Tensor) -> tuple[list[float | None], list[float | None]]:
    """The borders between cells inside and outside, as line pieces with gaps between; `inside` is [l h]."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    framed = torch.nn.functional.pad(inside, (1, 1, 1, 1))
    for layer, head in inside.nonzero().tolist():
        for dl, dh in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if not framed[layer + 1 + dl, head + 1 + dh]:
                x, y = layer + dl / 2, head + dh / 2
                # along the border, which is at a right angle to the step over it
                xs += [x - abs(dh) / 2, x + abs(dh) / 2, None]
                ys += [y - abs(dl) / 2, y + abs(dl) / 2, None]
    return xs, ys


def _whole(count: int) -> dict[str, Any]:
    """Axis of layers or heads: whole numbers, as many as there is room for."""
    return {"dtick": 1 if count <= 12 else None, "tickangle": 0, "showgrid": False, "zeroline": False}


def _listed(heads: HeadSet) -> str:
    names = [str(head) for head in heads]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
