"""Agreement of rankings of heads, as a figure."""

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from interp.analyses.results.head_scores import HeadScores
from interp.plots.heads import p_text
from interp.plots.style import SCALE, layout, safe, title_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def rankings(scores: Mapping[str, HeadScores], k: int = 10) -> "Figure":
    """Draw how far rankings of heads agree: rank correlations below the diagonal, shared heads of the top k above it.

    The cells above the diagonal also hold the overlaps that are expected by chance over all heads and within layers,
    and p, the probability of at least this overlap if heads are permuted within their layers.

    Args:
        scores: Score tables of one model, by name.
        k: Length of the lists that are compared.

    Returns:
        Figure: A plotly figure.

    Raises:
        ScoreError: If tables differ in shape.
        UsageError: For a k outside of the number of scored heads.
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
        chance = f"{agreed.expected_overlap:.1f}, {agreed.expected_within_layers:.1f}"
        text[i][j] = f"{agreed.overlap} of {k}<br>chance {chance}<br>{safe(p_text(agreed.p_overlap))}"
    labels = [safe(title_of(name)) for name in names]
    picture = go.Figure(
        go.Heatmap(
            z=z, text=text, texttemplate="%{text}", colorscale=SCALE, zmin=-0.25, zmax=1.4, showscale=False, xgap=2,
            ygap=2, hovertemplate="%{text}<extra></extra>",
        )
    )  # fmt: skip
    notes = [f"below: rank correlation; above: shared by the top {k}; chance over all heads, and within layers with p"]
    picture.update_layout(**layout("Rankings of heads compared", notes, 90 * size + 140))
    for axis in (picture.update_xaxes, picture.update_yaxes):
        axis(tickvals=list(range(size)), ticktext=labels, showgrid=False, zeroline=False)
    picture.update_yaxes(range=[size - 0.5, -0.5])
    return picture
