"""All heads of a model in one figure, and profiles over its layers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.head_roles import HeadRoles, head_roles
from interp.hooks.model.heads import Head
from interp.plots.dispatch import figure
from interp.plots.style import ABOVE, GREY, colour_of, layout, listed_rows, number, safe, title_of, whole

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CONFIDENT, TENTATIVE, NO_ROLE = 1.0, 0.45, 0.16
"""opacity of a head that is confidently above the threshold, of one whose mean is, and of a head without a role"""
NUMBERED = {"texttemplate": "%{text}", "textfont": {"size": 10}}
CELL_SIZE = 22
"""height of a head in pixels, where its number fits"""


@figure.register(HeadRoles)
def _(result: HeadRoles) -> "Figure":
    return atlas(result)


def atlas(scores: Mapping[str, HeadScores] | HeadRoles) -> "Figure":
    """Draw every head under its role, stacked layer by layer.

    Within a layer, heads are sorted by role, so that a column is the profile of that layer. The number in a cell is the
    number of the head; it is left out where the head has no role. A solid cell is confident: the head is above the
    threshold with a false discovery rate of at most 5 % over all heads of its table. A pale cell is tentative: only the
    mean is above the threshold. Grey cells have none of the roles.

    Args:
        scores: Score tables of one model by name, or the roles made of them, see `head_roles`.

    Returns:
        Figure: A plotly figure.

    Raises:
        ScoreError: If no table has a threshold, or tables differ in shape.
    """
    import plotly.graph_objects as go

    found = scores if isinstance(scores, HeadRoles) else head_roles(scores)
    main = found.main
    layers, heads = main.shape
    confident = found.confident
    kinds = len(found.names)
    # two colours for each role, tentative and confident, and one for no role
    code = torch.where(main < 0, 2 * kinds, 2 * main + confident.gather(0, main.clamp(min=0)[None])[0].int())
    # heads with roles first, in the order of the roles, confident ones before tentative ones, then by score
    weight = torch.where(
        main < 0, 2.0 * kinds + 1, 2.0 * main + 1 - confident.gather(0, main.clamp(min=0)[None])[0].float()
    )
    value = torch.where(main < 0, 0.0, found.scores.gather(0, main.clamp(min=0)[None])[0]).nan_to_num(0.0)
    order = (weight * 1e6 - value).argsort(dim=1, stable=True)
    about = [[_about(found, Head(layer, head)) for head in range(heads)] for layer in range(layers)]
    rows = order.tolist()
    # numbers only where a head has a role, so that these are easy to find
    names = [
        ["" if int(main[layer, row[place]]) < 0 else str(row[place]) for layer, row in enumerate(rows)]
        for place in range(heads)
    ]
    text = [[about[layer][rows[layer][place]] for layer in range(layers)] for place in range(heads)]
    size = CELL_SIZE if heads <= 16 else max(9, 320 // heads + 4)
    picture = go.Figure(
        go.Heatmap(
            z=code.gather(1, order).T.contiguous().numpy(), text=names, customdata=text, xgap=1.5, ygap=1.5,
            hovertemplate="%{customdata}<extra></extra>", showscale=False, zmin=-0.5, zmax=2 * kinds + 0.5,
            colorscale=_steps([*_tints(found.names), _rgba(GREY, NO_ROLE)]),
            **(NUMBERED if heads <= 16 and layers <= 40 else {}),
        )
    )  # fmt: skip
    for place, name in enumerate(found.names):
        here = main == place
        label = f"{title_of(name)}: {int(here.sum())}"
        if int(found.has[place].sum()) != int(here.sum()):
            label += f" (of {int(found.has[place].sum())})"
        picture.add_scatter(
            x=[None], y=[None], mode="markers", name=safe(label), **_key(colour_of(name, place), CONFIDENT)
        )
    picture.add_scatter(
        x=[None], y=[None], mode="markers", name=f"no role: {int((main < 0).sum())}", **_key(GREY, NO_ROLE)
    )
    sentences = [
        "A head with several roles is drawn once, in the colour of the first role in the legend that is confident (if "
        "none is, of its first role).",
        "For each role, the legend gives the number of heads drawn in its colour and, in brackets, of all heads that "
        "have the role.",
    ]
    if heads <= 16 and layers <= 40:
        sentences.append("The number in a cell is the index of the head in its layer.")
    notes = [
        f"{layers * heads} heads",
        "solid: confidently above the role's threshold (false discovery rate 5 %)",
        f"pale: mean above it, but not confidently. {' '.join(sentences)}",
    ]
    picture.update_layout(**layout("Roles of the heads", notes, size * heads + 184), meta=_table(found))
    picture.update_layout(**ABOVE)
    picture.update_xaxes(title="layer", range=[-0.6, layers - 0.4], **whole(layers))
    picture.update_yaxes(title="heads of the layer, sorted by role", range=[heads - 0.4, -0.6], showticklabels=False)
    picture.update_yaxes(showgrid=False, zeroline=False)
    return picture


def depth(scores: Mapping[str, HeadScores]) -> "Figure":
    """Draw the strength of each analysis by layer: the layer's highest head as a line, the mean of its heads dotted.

    Only tables of shares (0 to 1) fit one axis; other tables are left out.

    Args:
        scores: Score tables of one model, by name.

    Returns:
        Figure: A plotly figure.
    """
    import plotly.graph_objects as go

    picture = go.Figure()
    shown = {name: table for name, table in scores.items() if _is_share(table)}
    for place, (name, table) in enumerate(shown.items()):
        colour = colour_of(name, place)
        values = table.values
        best = values.nan_to_num(nan=-1.0).max(1)
        for label, line, width, dash in (
            (title_of(name), best.values.where(best.values >= 0, torch.nan), 2.2, "solid"),
            ("", values.nanmean(1), 1.3, "dot"),
        ):
            heads = [f"L{layer}H{head}" for layer, head in enumerate(best.indices.tolist())]
            labels = [f"highest: {head}" if label else "mean of the layer" for head in heads]
            picture.add_scatter(
                x=list(range(table.layers)), y=line.numpy(), mode="lines", name=safe(label), showlegend=bool(label),
                legendgroup=str(place), line={"color": colour, "width": width, "dash": dash}, text=labels,
                hovertemplate=f"{safe(title_of(name))}<br>layer %{{x}}: %{{y:.3f}}<br>%{{text}}<extra></extra>",
            )  # fmt: skip
    notes = ["line: highest head of the layer", "dotted: mean of its heads"]
    picture.update_layout(**layout("Depth profiles", notes, 374))
    picture.update_layout(**ABOVE)
    picture.update_xaxes(title="layer", **whole(max((table.layers for table in shown.values()), default=1)))
    picture.update_yaxes(title="score", range=[-0.02, 1.02])
    return picture


def _table(found: HeadRoles) -> dict[str, Any]:
    """Each head with its role and all scores, for saving the figure as a table."""
    layers, heads = found.main.shape
    names = [f"L{layer}H{head}" for layer in range(layers) for head in range(heads)]
    rows = listed_rows(names, *(scores.flatten().tolist() for scores in found.scores))
    mains = ["" if main < 0 else title_of(found.names[main]) for main in found.main.flatten().tolist()]
    columns = ["head", "role", *(title_of(name) for name in found.names)]
    return {"columns": columns, "rows": [[row[0], main, *row[1:]] for row, main in zip(rows, mains, strict=True)]}


def _is_share(table: HeadScores) -> bool:
    known = table.values[~table.values.isnan()]
    return bool(len(known)) and float(known.min()) >= 0 and float(known.max()) <= 1


def _about(found: HeadRoles, head: Head) -> str:
    main = int(found.main[head.layer, head.head])
    lines = [str(head) if main < 0 else f"{head}: {safe(title_of(found.names[main]).lower())}"]
    for place, (name, threshold) in enumerate(zip(found.names, found.thresholds, strict=True)):
        score, confident = float(found.scores[place][head]), bool(found.confident[place][head])
        mark = " ✓" if confident else " (?)" if score > threshold else ""
        lines.append(f"{safe(title_of(name))} {number(score)}{mark}")
    return "<br>".join(lines)


def _tints(names: tuple[str, ...]) -> list[str]:
    colours = [colour_of(name, place) for place, name in enumerate(names)]
    return [_rgba(colour, alpha) for colour in colours for alpha in (TENTATIVE, CONFIDENT)]


def _steps(colours: list[str]) -> list[list[Any]]:
    """A colour scale in steps, one colour for each whole number from 0."""
    n = len(colours)
    return [[edge / n, colour] for place, colour in enumerate(colours) for edge in (place, place + 1)]


def _rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _key(colour: str, alpha: float) -> dict[str, Any]:
    return {"marker": {"symbol": "square", "size": 12, "color": _rgba(colour, alpha)}, "hoverinfo": "skip"}
