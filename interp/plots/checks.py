"""Figures of controls: answers under conditions, and measures against the number of heads taken out."""

from typing import TYPE_CHECKING, Any

from interp.analyses.causal.ablation_test import CausalCheck
from interp.analyses.causal.curve import Curve
from interp.hooks.model.heads import HeadSet
from interp.plots.style import ABOVE, BLUE, GREY, LINES, ORANGE, layout, safe, title_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


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
        ticks.append(f"{safe(label)}<br>{mean:.0%}{drawn}")
        about.append(f"{safe(label)}<br>{mean:.1%} [{low:.1%}, {high:.1%}]")
        for i, outcome in enumerate(outcomes if len(outcomes) > 1 else ()):
            dots["x"].append(outcome.accuracy)
            dots["y"].append(row + 0.18 + 0.14 * i / max(len(outcomes) - 1, 1))
            right = f"{sum(outcome.verdicts)} of {len(outcome.verdicts)} right"
            dots["text"].append(f"{safe(outcome.condition.name)}: {right}<br>{listed(outcome.condition.heads)}")
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
    title = f"Answers under {safe(check.kind)}" if steered else f"Answers with heads taken out ({check.kind} ablation)"
    figure.update_layout(**layout(title, said, 66 * len(means) + 120))
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
            x=[0, *sizes], y=means, mode="lines+markers", name=safe(name),
            line={"color": colour, "dash": dash, "width": 2}, marker={"size": 6},
            error_y={
                "array": [high - mean for mean, _, high in rows], "arrayminus": [mean - low for mean, low, _ in rows],
                "color": colour, "thickness": 1, "width": 3,
            },
            text=[f"{safe(name)}, {size} heads<br>{mean:.3f} [{low:.3f}, {high:.3f}]"
                  for size, (mean, low, high) in zip([0, *sizes], rows, strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    said = [f"{len(points.points[0].values[measure])} prompts", "bars: 95% interval over prompts and draws"]
    figure.update_layout(**layout(f"{title_of(measure)}, heads taken out ({points.kind} ablation)", said, 380))
    figure.update_layout(**ABOVE)
    figure.update_xaxes(title="heads taken out")
    figure.update_yaxes(title=safe(measure), rangemode="tozero")
    return figure


def listed(heads: HeadSet) -> str:
    names = [str(head) for head in heads]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
