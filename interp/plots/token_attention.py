"""The figure of attention on the tokens of a prompt."""

from typing import TYPE_CHECKING

from interp.analyses.views.token_attention import TokenAttention
from interp.plots.dispatch import figure
from interp.plots.logit_lens import spelled
from interp.plots.style import LINES, layout, safe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DASHES = ("solid", "dash", "dot")


@figure.register(TokenAttention)
def _(result: TokenAttention) -> "Figure":
    return token_attention(result)


def token_attention(result: TokenAttention) -> "Figure":
    """Draw the attention of each head on the tokens of a prompt; marked ranges are grey bands.

    Args:
        result: The view.

    Returns:
        Figure: A plotly figure.
    """
    import plotly.graph_objects as go

    picture = go.Figure()
    for place, (head, row) in enumerate(zip(result.heads, result.weights, strict=True)):
        style = {"color": LINES[place % len(LINES)], "dash": DASHES[place // len(LINES) % len(DASHES)], "width": 1.6}
        picture.add_scatter(
            x=list(range(len(row))), y=row.numpy(), mode="lines", name=safe(head), line=style,
            text=[spelled(token) for token in result.tokens],
            hovertemplate=f"{safe(head)}<br>%{{text}} at %{{x}}: %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    for ranges in result.marks.values():
        for start, stop in ranges:
            picture.add_vrect(x0=start - 0.5, x1=stop - 0.5, fillcolor="#8a8f98", opacity=0.2, line_width=0)
    notes = [result.title, f"grey: {', '.join(result.marks)}" if result.marks else ""]
    picture.update_layout(**layout("Attention at the start of a reply", notes, 380))
    picture.update_xaxes(title="position")
    picture.update_yaxes(title="share of attention", rangemode="tozero")
    return picture
