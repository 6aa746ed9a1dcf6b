"""The figure of a head's queries and keys in one plane."""

from typing import TYPE_CHECKING, Any, Literal, get_args

from interp.analyses.views.qk_projection import Cloud, QKProjection
from interp.errors import UsageError
from interp.plots.dispatch import figure
from interp.plots.logit_lens import DARK, spelled
from interp.plots.style import BLUE, LINES, ORANGE, SCALE, layout, number, safe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Colour = Literal["kind", "position", "prompt"]
# queries and keys differ in shape under every colouring
SHAPES = {"query": "circle", "key": "diamond-open"}
PLURAL = {"query": "queries", "key": "keys"}
KINDS = {"query": BLUE, "key": ORANGE}
# lightness for the position, a hue for each kind
WARM = ((0.0, "#fbe9dc"), (0.25, "#f6c49c"), (0.5, "#ea8a4a"), (0.75, "#b85310"), (1.0, "#5f2600"))
SCALES = {"query": SCALE[1:], "key": WARM[1:]}
N_LISTED, MAX_CHARACTERS = 12, 40
"""prompts that a legend names, and characters of each name"""


@figure.register(QKProjection)
def _(result: QKProjection) -> "Figure":
    return qk_projection(result)


def qk_projection(result: QKProjection, head: Any = None, color: Colour = "kind") -> "Figure":
    """Draw the queries (dots) and keys (open diamonds) of one head in the plane.

    First tokens have a dark ring.

    Args:
        result: The view.
        head: One of `result.heads`, by default the first.
        color: "kind" is blue and orange. "position" is the same, darker toward the end of the prompt. "prompt" is one
            colour for each prompt.

    Returns:
        Figure: A plotly figure.

    Raises:
        HeadError: For a head that is not in the view.
        UsageError: For an unknown color.
    """
    import plotly.graph_objects as go

    if color not in get_args(Colour):
        raise UsageError(f"unknown color {color!r}; choose from 'kind', 'position', 'prompt'.")
    cloud = result.clouds[0] if head is None else result[head]
    numbers, positions = result.prompts.tolist(), result.positions.tolist()
    listed = len(set(numbers)) <= N_LISTED
    picture = go.Figure()
    for kind, dots in (("query", cloud.queries.numpy()), ("key", cloud.keys.numpy())):
        about = [
            f"{cloud.head}, {kind}<br>{spelled(token)}<br>position {position}, {safe(result.labels[prompt])}"
            for token, position, prompt in zip(result.tokens, positions, numbers, strict=True)
        ]
        for place, (name, chosen, marker) in enumerate(_groups(result, kind, color)):
            together = color == "prompt"
            picture.add_scatter(
                x=dots[chosen, 0], y=dots[chosen, 1], text=[about[i] for i in chosen],
                mode="markers", name=safe(name), legendgroup=str(place) if together else kind,
                showlegend=color == "kind" or (together and listed and kind == "query"),
                marker={"symbol": SHAPES[kind], "size": 7} | marker, hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
        if color != "kind":
            # legend of the shapes
            picture.add_scatter(
                x=[None], y=[None], mode="markers", name=PLURAL[kind], legendgroup=kind,
                marker={"symbol": SHAPES[kind], "color": DARK if color == "prompt" else KINDS[kind]},
            )  # fmt: skip
        first = [i for i, position in enumerate(positions) if position == 0]
        if first:
            picture.add_scatter(
                x=dots[first, 0], y=dots[first, 1], mode="markers", hoverinfo="skip",
                name="first token", legendgroup="first", showlegend=kind == "query",
                marker={"symbol": "circle-open", "size": 13, "color": DARK, "line": {"width": 1.5}},
            )  # fmt: skip
    notes = _notes(result, cloud) + ["darker: later in the prompt"] * (color == "position")
    picture.update_layout(**layout(f"{cloud.head}: queries and keys", notes, 600))
    # below the plot, since the width of a plane of equal units depends on the page
    picture.update_layout(legend={"orientation": "h", "x": 0, "y": -0.12, "yanchor": "top"})
    picture.update_xaxes(title=_axis(cloud, 0), zeroline=False, constrain="domain", constraintoward="left")
    # distances have to look the same in both directions
    picture.update_yaxes(title=_axis(cloud, 1), zeroline=False, constrain="domain", scaleanchor="x", scaleratio=1)
    return picture


def _groups(result: QKProjection, kind: str, color: Colour) -> list[tuple[str, list[int], dict[str, Any]]]:
    """Name, tokens and marker of each trace."""
    everything = list(range(len(result.tokens)))
    numbers, positions = result.prompts.tolist(), result.positions.tolist()
    if color == "prompt":
        return [
            (
                _cut(result.labels[prompt]),
                [i for i in everything if numbers[i] == prompt],
                {"color": LINES[prompt % len(LINES)]},
            )
            for prompt in sorted(set(numbers))
        ]
    if color == "kind":
        return [(PLURAL[kind], everything, {"color": KINDS[kind], "opacity": 0.7})]
    scale, last = SCALES[kind], max(positions)
    steps = [[(at - scale[0][0]) / (1 - scale[0][0]), colour] for at, colour in scale]
    return [(PLURAL[kind], everything, {"color": positions, "colorscale": steps, "cmin": 0, "cmax": max(last, 1)})]


def _cut(label: str) -> str:
    return label if len(label) <= MAX_CHARACTERS else label[: MAX_CHARACTERS - 1] + "…"


def _axis(cloud: Cloud, place: int) -> str:
    if cloud.explained is None:
        return f"t-SNE {place + 1} (no unit)"
    return f"component {place + 1}, {cloud.explained[place]:.0%} of variance"


def _notes(result: QKProjection, cloud: Cloud) -> list[str]:
    notes = [f"{len(result.prompts.unique())} prompts, {len(result.tokens)} tokens"]
    if cloud.faithful is not None and cloud.possible is not None:
        notes.append(
            f"nearness ranks q·k at Spearman {number(cloud.faithful)} ({number(cloud.possible)} in all dimensions)"
        )
    if cloud.nearest is not None and cloud.chance is not None:
        notes.append(
            f"the nearest key has the largest q·k for {cloud.nearest:.0%} of queries (chance {cloud.chance:.0%})"
        )
    return notes
