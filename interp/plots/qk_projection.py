"""The figure of a head's queries and keys in one plane."""

from typing import TYPE_CHECKING, Any, Literal, get_args

from interp.analyses.views.qk_projection import Cloud, QKProjection
from interp.errors import UsageError
from interp.plots.logit_lens import DARK, spelled
from interp.plots.style import BLUE, LINES, ORANGE, SCALE, layout, number, safe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Colour = Literal["kind", "position", "prompt"]
# a query and a key differ in shape whatever the colour says
SHAPES = {"query": "circle", "key": "diamond-open"}
PLURAL = {"query": "queries", "key": "keys"}
KINDS = {"query": BLUE, "key": ORANGE}
# lightness for the position, a hue for each kind
WARM = ((0.0, "#fbe9dc"), (0.25, "#f6c49c"), (0.5, "#ea8a4a"), (0.75, "#b85310"), (1.0, "#5f2600"))
SCALES = {"query": SCALE[1:], "key": WARM[1:]}
LISTED, WIDE = 12, 40
"""prompts that a legend names, and characters of each name"""


def qk_projection(joint: QKProjection, head: Any = None, color: Colour = "kind") -> "Figure":
    """Queries (dots) and keys (open diamonds) of one head in the plane, the first head of the view by default.

    color: "kind" blue and orange; "position" the same, darker toward the end of the prompt; "prompt" a colour for each,
    in turn. First tokens have a dark ring. Raises HeadError, UsageError.
    """
    import plotly.graph_objects as go

    if color not in get_args(Colour):
        raise UsageError(f"color={color!r}: take 'kind', 'position' or 'prompt'.")
    cloud = joint.clouds[0] if head is None else joint[head]
    listed = len(set(joint.prompts)) <= LISTED
    figure = go.Figure()
    for kind, dots in (("query", cloud.queries), ("key", cloud.keys)):
        about = [
            f"{cloud.head}, {kind}<br>{spelled(token)}<br>position {position}, {safe(joint.labels[prompt])}"
            for token, position, prompt in zip(joint.tokens, joint.positions, joint.prompts, strict=True)
        ]
        for place, (name, chosen, marker) in enumerate(_groups(joint, kind, color)):
            together = color == "prompt"
            figure.add_scatter(
                x=[dots[i][0] for i in chosen], y=[dots[i][1] for i in chosen], text=[about[i] for i in chosen],
                mode="markers", name=safe(name), legendgroup=str(place) if together else kind,
                showlegend=color == "kind" or (together and listed and kind == "query"),
                marker={"symbol": SHAPES[kind], "size": 7} | marker, hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
        if color != "kind":
            # what the shapes mean, in a colour that is not the first point's
            figure.add_scatter(
                x=[None], y=[None], mode="markers", name=PLURAL[kind], legendgroup=kind,
                marker={"symbol": SHAPES[kind], "color": DARK if color == "prompt" else KINDS[kind]},
            )  # fmt: skip
        first = [i for i, position in enumerate(joint.positions) if position == 0]
        if first:
            figure.add_scatter(
                x=[dots[i][0] for i in first], y=[dots[i][1] for i in first], mode="markers", hoverinfo="skip",
                name="first token", legendgroup="first", showlegend=kind == "query",
                marker={"symbol": "circle-open", "size": 13, "color": DARK, "line": {"width": 1.5}},
            )  # fmt: skip
    said = _said(joint, cloud) + ["darker: later in the prompt"] * (color == "position")
    figure.update_layout(**layout(f"{cloud.head}: queries and keys", said, 600))
    # below, since a plane of equal units leaves the side empty or not, as the page is wide
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.12, "yanchor": "top"})
    figure.update_xaxes(title=_axis(cloud, 0), zeroline=False, constrain="domain", constraintoward="left")
    # near has to look the same in both directions
    figure.update_yaxes(title=_axis(cloud, 1), zeroline=False, constrain="domain", scaleanchor="x", scaleratio=1)
    return figure


def _groups(joint: QKProjection, kind: str, color: Colour) -> list[tuple[str, list[int], dict[str, Any]]]:
    """(name, which tokens, how they look), one trace each."""
    everything = list(range(len(joint.tokens)))
    if color == "prompt":
        return [
            (
                _cut(joint.labels[prompt]),
                [i for i in everything if joint.prompts[i] == prompt],
                {"color": LINES[prompt % len(LINES)]},
            )
            for prompt in sorted(set(joint.prompts))
        ]
    if color == "kind":
        return [(PLURAL[kind], everything, {"color": KINDS[kind], "opacity": 0.7})]
    scale, last = SCALES[kind], max(joint.positions)
    steps = [[(at - scale[0][0]) / (1 - scale[0][0]), colour] for at, colour in scale]
    return [
        (PLURAL[kind], everything, {"color": joint.positions, "colorscale": steps, "cmin": 0, "cmax": max(last, 1)})
    ]


def _cut(label: str) -> str:
    return label if len(label) <= WIDE else label[: WIDE - 1] + "…"


def _axis(cloud: Cloud, place: int) -> str:
    if cloud.explained is None:
        return f"t-SNE {place + 1} (no unit)"
    return f"component {place + 1}, {cloud.explained[place]:.0%} of variance"


def _said(joint: QKProjection, cloud: Cloud) -> list[str]:
    said = [f"{len(set(joint.prompts))} prompts, {len(joint.tokens)} tokens"]
    if cloud.faithful is not None and cloud.possible is not None:
        said.append(
            f"nearness ranks q·k at Spearman {number(cloud.faithful)} ({number(cloud.possible)} in all dimensions)"
        )
    if cloud.nearest is not None and cloud.chance is not None:
        said.append(
            f"the nearest key has the largest q·k for {cloud.nearest:.0%} of queries (chance {cloud.chance:.0%})"
        )
    return said
