"""The figure of a needle sweep: the share of right replies by length and depth."""

from typing import TYPE_CHECKING

from interp.analyses.views.needle_sweep import NeedleSweep
from interp.plots.dispatch import figure
from interp.plots.style import SCALE, layout

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@figure.register(NeedleSweep)
def _(result: NeedleSweep) -> "Figure":
    return needle_sweep(result)


def needle_sweep(result: NeedleSweep) -> "Figure":
    """Draw the share of right replies by length and depth: lengths from left to right, the text from top to bottom.

    A cell without prompts is a gap. The hover states the number of prompts.

    Args:
        result: The sweep.

    Returns:
        Figure: A plotly figure.

    Examples:
        >>> from interp.analyses.views.needle_sweep import NeedleSweep
        >>> two = {"recall": (1.0, 0.0), "at_limit": (0.0, 0.0), "replies": ("yes", "no")}
        >>> found = NeedleSweep(lengths=(256, 512), depths=(0.5, 0.5), right=(1.0, 0.0), **two)
        >>> interp.plots.needle_sweep(found).data[0].z.tolist()
        [[1.0, 0.0]]
    """
    import numpy as np
    import plotly.graph_objects as go

    lengths, depths = sorted(set(result.lengths)), sorted(set(result.depths))
    cells = [[result.cell(length, depth) for length in lengths] for depth in depths]
    shares = np.array([[sum(cell) / len(cell) if cell else np.nan for cell in row] for row in cells])
    about = [
        [
            f"{length:,} tokens, depth {depth:g}<br>{sum(cell):.0f} of {len(cell)} right" if cell else ""
            for length, cell in zip(lengths, row, strict=True)
        ]
        for depth, row in zip(depths, cells, strict=True)
    ]
    picture = go.Figure(
        go.Heatmap(
            x=list(range(len(lengths))), y=list(range(len(depths))), z=shares, text=about, xgap=2, ygap=2,
            hovertemplate="%{text}<extra></extra>", coloraxis="coloraxis",
        )
    )  # fmt: skip
    each = {len(cell) for row in cells for cell in row if cell}
    count = f"{min(each)} to {max(each)}" if len(each) > 1 else str(min(each))
    source = result.settings.get("haystack", "")
    notes = [
        f"share of right replies, {count} {'prompt' if each == {1} else 'prompts'} in a cell",
        "text: prose of the grammar" if source == "grammar" else f"text: {source}" if source else "",
    ]
    picture.update_layout(
        **layout("Needles by length and depth", notes, 34 * len(depths) + 150),
        coloraxis={
            "colorscale": SCALE, "cmin": 0.0, "cmax": 1.0,
            "colorbar": {"thickness": 10, "outlinewidth": 0, "tickformat": ".0%", "nticks": 5},
        },
    )  # fmt: skip
    picture.update_xaxes(
        title="length of the prompt, tokens", tickvals=list(range(len(lengths))), range=[-0.5, len(lengths) - 0.5],
        ticktext=[f"{length:,}" for length in lengths], showgrid=False, zeroline=False,
    )  # fmt: skip
    picture.update_yaxes(
        title="depth of the needle", tickvals=list(range(len(depths))), range=[len(depths) - 0.5, -0.5],
        ticktext=[f"{depth:g}" for depth in depths], showgrid=False, zeroline=False,
    )  # fmt: skip
    return picture
