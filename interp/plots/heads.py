"""Figures of score tables: every head, the best heads, two tables against each other, attention by position."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.plots.dispatch import figure
from interp.plots.style import (
    ABOVE,
    BLUE,
    GREY,
    LINES,
    ORANGE,
    SCALE,
    layout,
    lines,
    listed_rows,
    number,
    title_of,
    whole,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@figure.register(HeadScores)
def _(result: HeadScores) -> "Figure":
    return head_map(result)


def head_map(scores: HeadScores) -> "Figure":
    """Draw every head of the model: layers from left to right, heads from top to bottom, the score as lightness.

    Scores that go below zero are purple above zero and orange below it. Heads above the threshold are outlined. A head
    without a score is a gap.

    Args:
        scores: A score table.

    Returns:
        Figure: A plotly figure.

    Examples:
        >>> interp.plots.head_map(scores).data[0].z.shape
        (4, 2)
    """
    import plotly.graph_objects as go

    values, known = scores.values, scores.values[~scores.values.isnan()]
    low, high = (min(0.0, float(known.min())), float(known.max())) if len(known) else (0.0, 1.0)
    # zero in the middle of the colours
    signed = low < -0.1 * high
    if signed:
        low, high = -max(-low, high), max(-low, high)
    about = about_heads(scores)
    text = [[about[layer][head] for layer in range(scores.layers)] for head in range(scores.n_heads)]
    picture = go.Figure(
        go.Heatmap(
            z=values.T.contiguous().numpy(), text=text, hovertemplate="%{text}<extra></extra>", coloraxis="coloraxis",
            xgap=1, ygap=1,
        )
    )  # fmt: skip
    notes = [scores.unit, f"mean over {scores.counted} of {len(scores.per_prompt)} prompts"]
    if scores.threshold is not None:
        above = values > scores.threshold
        xs, ys = _outline(above)
        picture.add_scatter(
            x=xs, y=ys, mode="lines", line={"color": ORANGE, "width": 1.5}, hoverinfo="skip", showlegend=False
        )
        notes.append(f"outlined: above {scores.threshold:g} ({int(above.sum())} of {scores.n_scored} heads)")
    cell = 24 if scores.n_heads <= 12 else 16 if scores.n_heads <= 40 else 10
    picture.update_layout(
        **layout(f"{title_of(scores.name)}: score of each head", notes, cell * scores.n_heads + 120),
        meta=_numbers(scores),
        coloraxis={
            "colorscale": "PuOr" if signed else SCALE, "cmin": low, "cmax": high if high > low else low + 1,
            "colorbar": {"thickness": 10, "outlinewidth": 0, "nticks": 5},
        },
    )  # fmt: skip
    picture.update_xaxes(title="layer", range=[-0.6, scores.layers - 0.4], **whole(scores.layers))
    picture.update_yaxes(title="head", range=[scores.n_heads - 0.4, -0.6], **whole(scores.n_heads))
    return picture


def gains(scores: HeadScores) -> "Figure":
    """Draw the gain of each head when it alone is steered, purple up and orange down.

    Args:
        scores: Scores of a steering profile.

    Returns:
        Figure: A plotly figure.
    """
    picture = head_map(scores)
    known = scores.values[~scores.values.isnan()].abs()
    largest = float(known.max()) if len(known) and known.max() > 0 else 1.0
    shown: Any = picture.layout
    shown.coloraxis.update(colorscale="PuOr", cmin=-largest, cmax=largest)
    shown.title.text = "Gain of each head, steered alone"
    return picture


def top_heads(scores: HeadScores, k: int = 10) -> "Figure":
    """Draw the highest scored heads with their 95 % intervals over prompts and the threshold, the best on top.

    Args:
        scores: A score table.
        k: Number of heads.

    Returns:
        Figure: A plotly figure.

    Raises:
        UsageError: For a negative k.
    """
    import plotly.graph_objects as go

    heads = scores.top(k)
    chosen = values_at(scores.values, heads)
    ends = [values_at(end, heads) for end in (scores.low, scores.high)]
    about = about_heads(scores)
    picture = go.Figure(
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
        picture.add_vline(x=scores.threshold, line={"color": ORANGE, "width": 1.5, "dash": "dot"})
    notes = ["bars: 95 % interval over prompts"]
    if scores.threshold is not None:
        notes.append(f"vertical line: threshold {scores.threshold:g}")
    picture.update_layout(**layout(f"{title_of(scores.name)}: top {len(heads)} heads", notes, 26 * len(heads) + 120))
    picture.update_xaxes(title=lines(scores.unit), rangemode="tozero")
    picture.update_yaxes(
        tickvals=list(range(len(heads))),
        ticktext=[f"{head}  {number(value)}" for head, value in zip(heads, chosen.tolist(), strict=True)],
        range=[len(heads) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    return picture


def scatter(one: HeadScores, other: HeadScores, k: int = 10) -> "Figure":
    """Draw each head by its scores in two tables; heads in the top k of both are orange.

    Args:
        one: Scores along x.
        other: Scores along y, of the same model.
        k: Length of the lists that are compared.

    Returns:
        Figure: A plotly figure.

    Raises:
        ScoreError: If the tables differ in shape.
        UsageError: For a k outside of the number of heads that both tables score.
    """
    import plotly.graph_objects as go

    agreed = one.compare(other, k)
    heads = [head for head in one if not (one.values[head].isnan() or other.values[head].isnan())]
    both = set(agreed.shared)
    named = both | set(one.top(3)) | set(other.top(3))
    picture = go.Figure()
    for label, color, chosen in (
        ("other heads", BLUE, [head for head in heads if head not in both]),
        (f"in both top {k}", ORANGE, [head for head in heads if head in both]),
    ):
        if not chosen:
            continue
        chosen.sort(key=lambda head: float(one.values[head]))
        picture.add_scatter(
            x=values_at(one.values, chosen).numpy(),
            y=values_at(other.values, chosen).numpy(),
            mode="markers+text",
            name=label,
            marker={"size": 7, "color": color, "opacity": 0.75},
            text=[str(head) if head in named else "" for head in chosen],
            # labels of neighbours alternate between above and below, so that they do not overlap
            textposition=[("top center", "bottom center")[i % 2] for i in range(len(chosen))],
            textfont={"size": 10},
            customdata=[str(head) for head in chosen],
            hovertemplate="%{customdata}<br>%{x:.3f}, %{y:.3f}<extra></extra>",
        )
    notes = [
        f"Spearman {number(agreed.spearman)}. The two top {k} share {agreed.overlap} "
        f"head{'' if agreed.overlap == 1 else 's'}. Expected: {number(agreed.expected_overlap)} for random lists",
        f"{number(agreed.expected_within_layers)} for random lists with the same number of heads in each layer "
        f"({p_text(agreed.p_overlap)} for {agreed.overlap} or more)",
        f"{number(agreed.depth_overlap)} if heads were ranked by their layer's mean {title_of(other.name).lower()} "
        "score only.",
    ]
    picture.update_layout(**layout(f"{title_of(one.name)} against {title_of(other.name).lower()}", notes, 460))
    picture.update_layout(**ABOVE)
    picture.update_xaxes(title=lines(f"{title_of(one.name)}: {one.unit}"))
    picture.update_yaxes(title=lines(f"{title_of(other.name)}: {other.unit}"))
    return picture


def threshold_curve(scores: HeadScores, threshold: float | None = None) -> "Figure":
    """Draw how many heads are above each threshold, by their mean and confidently, with a line at the usual threshold.

    Args:
        scores: A score table.
        threshold: The usual threshold, by default that of the table.

    Returns:
        Figure: A plotly figure.

    Examples:
        >>> [line.name for line in interp.plots.threshold_curve(scores).data]
        ['mean above the threshold', 'confidently above the threshold']
    """
    import plotly.graph_objects as go

    points, usual = scores.threshold_curve(), scores.threshold if threshold is None else threshold
    thresholds = [point.threshold for point in points]
    picture = go.Figure()
    for name, counts, dash in (
        ("mean above the threshold", [point.above for point in points], "dot"),
        ("confidently above the threshold", [point.confident for point in points], "solid"),
    ):
        picture.add_scatter(
            x=thresholds, y=counts, mode="lines+markers", name=name, marker={"size": 4, "color": BLUE},
            line={"width": 1.8, "color": BLUE, "dash": dash},
            hovertemplate=f"{name}<br>threshold %{{x:.3g}}: %{{y}} heads<extra></extra>",
        )  # fmt: skip
    notes = ["confidently: false discovery rate of 5 % over all heads"]
    if usual is not None and usual > 0:
        picture.add_vline(x=usual, line={"color": ORANGE, "width": 1.5, "dash": "dot"})
        notes.append(f"vertical line: threshold {usual:g}")
    picture.update_layout(**layout(f"{title_of(scores.name)}: number of heads by threshold", notes, 340))
    picture.update_layout(**ABOVE)
    picture.update_xaxes(title=lines(f"threshold, {scores.unit}"), rangemode="tozero")
    picture.update_yaxes(title="heads", rangemode="tozero")
    return picture


def positions(scores: HeadScores, k: int = 5) -> "Figure":
    """Draw the mean attention that each position receives, in the top k heads and over all heads.

    Args:
        scores: Scores of `identify.sinks`, which hold attention by position.
        k: Number of heads.

    Returns:
        Figure: A plotly figure.

    Raises:
        UsageError: For scores without attention by position.
    """
    import plotly.graph_objects as go

    if "positions" not in scores.extras:
        raise UsageError(f"scores '{scores.name}' hold no attention by position; give scores of identify.sinks.")
    received = scores.extras["positions"].float().nanmean(0)
    heads = scores.top(k)
    lines = [(str(head), received[head], LINES[i % len(LINES)], 1.8) for i, head in enumerate(heads)]
    lines.append(("all heads", received.flatten(0, 1).nanmean(0), GREY, 4.0))
    picture = go.Figure()
    for name, line, color, width in lines:
        picture.add_scatter(
            x=list(range(len(line))),
            y=line.numpy(),
            mode="lines+markers",
            name=name,
            marker={"size": 4, "color": color},
            line={"width": width, "color": color},
            hovertemplate=f"{name}<br>position %{{x}}: %{{y:.3f}}<extra></extra>",
        )
    visible = scores.settings.get("rows") == "visible"
    queries = "the queries that can see the position" if visible else "all queries at or after the position"
    notes = [f"mean over {queries}, and over prompts", "0 is the first token"]
    picture.update_layout(**layout(f"{title_of(scores.name)}: attention by position", notes, 360))
    # within the axes: past the first positions the lines lie low
    picture.update_layout(legend={"x": 1, "xanchor": "right", "y": 1, "yanchor": "top", "bgcolor": "rgba(0,0,0,0)"})
    picture.update_xaxes(title="position of the key")
    picture.update_yaxes(title="attention received", rangemode="tozero")
    return picture


def _numbers(scores: HeadScores) -> dict[str, Any]:
    """The table behind a map, for saving it."""
    tables = [table.flatten().tolist() for table in (scores.values, scores.low, scores.high, scores.frequency)]
    names = [f"L{layer}H{head}" for layer in range(scores.layers) for head in range(scores.n_heads)]
    return {"columns": ["head", "score", "low", "high", "above 0 in"], "rows": listed_rows(names, *tables)}


def about_heads(scores: HeadScores) -> list[list[str]]:
    """Hover text of each head, by layer and head."""
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


def p_text(p: float) -> str:
    """A p-value as text, "no p" for NaN."""
    return "no p" if p != p else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def values_at(table: Tensor, heads: Any) -> Tensor:
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
