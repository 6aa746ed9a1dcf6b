"""All heads of a model in one picture, and what each layer does."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.head_roles import HeadRoles, head_roles
from interp.hooks.model.heads import Head
from interp.plots.style import ABOVE, GREY, colour_of, layout, listed_rows, number, safe, title_of, whole

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# solid where the interval is above the cut, paler where only the mean is
SURE, LIKELY, NONE = 1.0, 0.45, 0.16
NUMBERED = {"texttemplate": "%{text}", "textfont": {"size": 10}}
SIZE = 22
"""pixels a head is high, while there is room for its number"""


def atlas(scores: Mapping[str, HeadScores] | HeadRoles) -> "Figure":
    """Every head under the function that it was found to have, stacked layer by layer: what the model's heads do.

    Within a layer heads stand in the order of the functions, so that a column is that layer's profile; the number in a
    cell is the head's, left out where it has none of the functions. Solid: the 95% interval over prompts lies above the
    cut; pale: only the mean does; grey: none of the functions. See analyses.functions.
    """
    import plotly.graph_objects as go

    found = scores if isinstance(scores, HeadRoles) else head_roles(scores)
    main = found.main
    layers, heads = main.shape
    sure = found.sure & found.has
    kinds = len(found.names)
    # a colour for each function, twice: likely, sure; and one for none
    code = torch.where(main < 0, 2 * kinds, 2 * main + sure.gather(0, main.clamp(min=0)[None])[0].int())
    # functions first, in order, sure before likely; of equals the higher score first
    weight = torch.where(main < 0, 2.0 * kinds + 1, 2.0 * main + 1 - sure.gather(0, main.clamp(min=0)[None])[0].float())
    value = torch.where(main < 0, 0.0, found.scores.gather(0, main.clamp(min=0)[None])[0]).nan_to_num(0.0)
    order = (weight * 1e6 - value).argsort(dim=1, stable=True)
    about = [[_about(found, Head(layer, head)) for head in range(heads)] for layer in range(layers)]
    rows = order.tolist()
    # a number in every cell would hide the few that say something
    names = [
        ["" if int(main[layer, row[place]]) < 0 else str(row[place]) for layer, row in enumerate(rows)]
        for place in range(heads)
    ]
    text = [[about[layer][rows[layer][place]] for layer in range(layers)] for place in range(heads)]
    size = SIZE if heads <= 16 else max(9, 320 // heads + 4)
    figure = go.Figure(
        go.Heatmap(
            z=code.gather(1, order).T.contiguous().numpy(), text=names, customdata=text, xgap=1.5, ygap=1.5,
            hovertemplate="%{customdata}<extra></extra>", showscale=False, zmin=-0.5, zmax=2 * kinds + 0.5,
            colorscale=_steps([*_tints(found.names), _rgba(GREY, NONE)]),
            **(NUMBERED if heads <= 16 and layers <= 40 else {}),
        )
    )  # fmt: skip
    for place, name in enumerate(found.names):
        here = main == place
        label = f"{title_of(name)}: {int(here.sum())}"
        if int(found.has[place].sum()) != int(here.sum()):
            label += f" (of {int(found.has[place].sum())})"
        figure.add_scatter(x=[None], y=[None], mode="markers", name=safe(label), **_key(colour_of(name, place), SURE))
    figure.add_scatter(
        x=[None], y=[None], mode="markers", name=f"none of these: {int((main < 0).sum())}", **_key(GREY, NONE)
    )
    said = [
        f"{layers * heads} heads; solid: 95% interval above the cut, pale: only the mean",
        "in brackets: heads that have the function but stand under another",
    ]
    figure.update_layout(**layout("What the heads do", said, size * heads + 184), meta=_table(found))
    figure.update_layout(**ABOVE)
    figure.update_xaxes(title="layer", range=[-0.6, layers - 0.4], **whole(layers))
    figure.update_yaxes(title="heads, sorted", range=[heads - 0.4, -0.6], showticklabels=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
    return figure


def depth(scores: Mapping[str, HeadScores]) -> "Figure":
    """How strong each function is in each layer: the layer's highest head as a line, the mean of its heads dotted.

    Only tables that are shares (0 to 1) can stand on one axis; others are left out.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
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
            told = [f"highest: {head}" if label else "mean of the layer" for head in heads]
            figure.add_scatter(
                x=list(range(table.layers)), y=line.numpy(), mode="lines", name=safe(label), showlegend=bool(label),
                legendgroup=str(place), line={"color": colour, "width": width, "dash": dash}, text=told,
                hovertemplate=f"{safe(title_of(name))}<br>layer %{{x}}: %{{y:.3f}}<br>%{{text}}<extra></extra>",
            )  # fmt: skip
    said = ["line: highest head of the layer", "dotted: mean of its heads"]
    figure.update_layout(**layout("Depth profiles", said, 374))
    figure.update_layout(**ABOVE)
    figure.update_xaxes(title="layer", **whole(max((table.layers for table in shown.values()), default=1)))
    figure.update_yaxes(title="score", range=[-0.02, 1.02])
    return figure


def _table(found: HeadRoles) -> dict[str, Any]:
    """Each head with its function and all scores, for whoever saves the picture."""
    layers, heads = found.main.shape
    names = [f"L{layer}H{head}" for layer in range(layers) for head in range(heads)]
    rows = listed_rows(names, *(scores.flatten().tolist() for scores in found.scores))
    mains = ["" if main < 0 else title_of(found.names[main]) for main in found.main.flatten().tolist()]
    columns = ["head", "function", *(title_of(name) for name in found.names)]
    return {"columns": columns, "rows": [[row[0], main, *row[1:]] for row, main in zip(rows, mains, strict=True)]}


def _is_share(table: HeadScores) -> bool:
    known = table.values[~table.values.isnan()]
    return bool(len(known)) and float(known.min()) >= 0 and float(known.max()) <= 1


def _about(found: HeadRoles, head: Head) -> str:
    main = int(found.main[head.layer, head.head])
    lines = [str(head) if main < 0 else f"{head}: {safe(title_of(found.names[main]).lower())}"]
    for place, (name, cut) in enumerate(zip(found.names, found.cuts, strict=True)):
        score, low = (float(t[place, head.layer, head.head]) for t in (found.scores, found.low))
        mark = " ✓" if low > cut else " (?)" if score > cut else ""
        lines.append(f"{safe(title_of(name))} {number(score)}{mark}")
    return "<br>".join(lines)


def _tints(names: tuple[str, ...]) -> list[str]:
    colours = [colour_of(name, place) for place, name in enumerate(names)]
    return [_rgba(colour, alpha) for colour in colours for alpha in (LIKELY, SURE)]


def _steps(colours: list[str]) -> list[list[Any]]:
    """A colour scale of steps, one colour for each whole number from 0."""
    n = len(colours)
    return [[edge / n, colour] for place, colour in enumerate(colours) for edge in (place, place + 1)]


def _rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _key(colour: str, alpha: float) -> dict[str, Any]:
    return {"marker": {"symbol": "square", "size": 12, "color": _rgba(colour, alpha)}, "hoverinfo": "skip"}
