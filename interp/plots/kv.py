"""What dropping keys costs, and how far rankings of heads agree, as figures."""

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from interp.analyses.kv.curve import CONTROL, WHOLE, KeyCurve
from interp.analyses.results.head_scores import HeadScores
from interp.plots.style import ABOVE, GREY, LINES, SCALE, layout, safe, title_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MEASURES = {"right": "right tokens of the answer", "loss": "loss of the answer, nats per token"}
DASHES = ("solid", "dash", "dot")


def key_curve(curve: KeyCurve, task: str | None = None, measure: str = "right") -> "Figure":
    """A measure against the kept share, a line for each selector, random keys grey, with 95% intervals over prompts.

    The thin line is the model with every key; without a task the mean over all of them. Raises UsageError for a task or
    measure that the curve does not have.
    """
    import plotly.graph_objects as go

    points = [point for point in curve.points if task in (None, point.task) and point.selector == WHOLE]
    shares = curve.shares
    whole = curve.at(WHOLE, 1.0, task, measure)[0]
    figure = go.Figure()
    place = 0
    for name in curve.selectors:
        rows = [curve.at(name, share, task, measure) for share in shares]
        colour = GREY if name == CONTROL else LINES[place % len(LINES)]
        dash = "dot" if name == CONTROL else DASHES[place // len(LINES) % len(DASHES)]
        place += name != CONTROL
        figure.add_scatter(
            x=shares, y=[mean for mean, _, _ in rows], mode="lines+markers", name=safe(name),
            line={"color": colour, "dash": dash, "width": 2}, marker={"size": 6},
            error_y={
                "array": [high - mean for mean, _, high in rows], "arrayminus": [mean - low for mean, low, _ in rows],
                "color": colour, "thickness": 1, "width": 3,
            },
            text=[f"{safe(name)}, {share:.0%} kept<br>{mean:.3f} [{low:.3f}, {high:.3f}]"
                  for share, (mean, low, high) in zip(shares, rows, strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[shares[0], shares[-1]], y=[whole, whole], mode="lines", name="every key", line={"color": GREY, "width": 1},
        hovertemplate=f"every key: {whole:.3f}<extra></extra>",
    )  # fmt: skip
    said = [f"{sum(len(point.loss) for point in points)} prompts", "bars: 95% interval over prompts"]
    title = f"Mean over {len(points)} tasks" if task is None else title_of(task)
    figure.update_layout(**layout(f"{title}: keys of the context dropped", said, 414))
    figure.update_layout(**ABOVE)
    figure.update_xaxes(title="share of the context's keys that is kept", tickformat=".0%")
    figure.update_yaxes(title=MEASURES[measure], rangemode="tozero")
    return figure


def rankings(scores: Mapping[str, HeadScores], k: int = 10) -> "Figure":
    """How far rankings of heads agree: Spearman of each two below the diagonal, shared heads of the top k above it.

    The hover and the cell say p, of at least this overlap by chance. Raises as `HeadScores.compare`.
    """
    import plotly.graph_objects as go

    names = list(scores)
    size = len(names)
    z: list[list[float | None]] = [[None] * size for _ in range(size)]
    text = [[""] * size for _ in range(size)]
    for i, j in combinations(range(size), 2):
        agreed = scores[names[i]].compare(scores[names[j]], k)
        z[j][i] = agreed.spearman
        z[i][j] = agreed.overlap / k
        text[j][i] = f"ρ {agreed.spearman:.2f}"
        text[i][j] = f"{agreed.overlap} of {k}<br>p {agreed.p_overlap:.2g}"
    labels = [safe(title_of(name)) for name in names]
    figure = go.Figure(
        go.Heatmap(
            z=z, text=text, texttemplate="%{text}", colorscale=SCALE, zmin=-0.25, zmax=1.4, showscale=False, xgap=2,
            ygap=2, hovertemplate="%{text}<extra></extra>",
        )
    )  # fmt: skip
    expected = k * k / len(next(iter(scores.values())))
    said = [f"below: rank correlation; above: shared by the top {k}, {expected:.1f} by chance"]
    figure.update_layout(**layout("Rankings of heads compared", said, 90 * size + 140))
    for axis in (figure.update_xaxes, figure.update_yaxes):
        axis(tickvals=list(range(size)), ticktext=labels, showgrid=False, zeroline=False)
    figure.update_yaxes(range=[size - 0.5, -0.5])
    return figure
