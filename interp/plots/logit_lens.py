"""Figures of the tokens that heads write: a token in each cell."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from interp.analyses.views._tokens import Token, place_of_prompt
from interp.analyses.views.logit_lens import LogitLens
from interp.analyses.views.ov_tokens import N_COPIED, OvTokens
from interp.errors import UsageError
from interp.hooks.model.heads import Head
from interp.plots.dispatch import figure
from interp.plots.style import SCALE, layout, safe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_CHARACTERS = 11
"""characters of a token that fit a cell"""
MAX_ROWS = 30
"""rows of a figure that can be read"""
# light enough for dark text on every cell
PALE = tuple((2 * at, colour) for at, colour in SCALE if at <= 0.5)
DARK = "#1d2430"
SPACES = str.maketrans({" ": "\u00b7", "\n": "\u21b5", "\t": "\u2192", "\r": "\u240d"})
SIGNS = "· space, ↵ new line"


@figure.register(LogitLens)
def _(result: LogitLens) -> "Figure":
    return logit_lens(result)


@figure.register(OvTokens)
def _(result: OvTokens) -> "Figure":
    return ov(result)


def logit_lens(result: LogitLens, prompt: int = 0, side: Literal["raised", "lowered"] = "raised") -> "Figure":
    """Draw the tokens that each head raises or lowers most in one prompt, darker for larger logits.

    Args:
        result: The view.
        prompt: Number of the prompt.
        side: "raised" or "lowered".

    Returns:
        Figure: A plotly figure.

    Raises:
        UsageError: For an unknown side, or a prompt that is not in the view.
    """
    if side not in ("raised", "lowered"):
        raise UsageError(f"unknown side {side!r}; choose from 'raised', 'lowered'.")
    place_of_prompt(prompt, result.labels)
    rows = getattr(result, side)[prompt]
    through = "unembedding" if result.lens is None else f"unembedding, layer {result.lens} through its lens"
    place = result.queries[prompt]
    notes = [
        result.labels[prompt],
        f"written at {spelled(place.text, plain=True)} (position {place.position})",
        f"in logits, through the {through}",
        SIGNS,
    ]
    title = "Tokens that heads raise" if side == "raised" else "Tokens that heads lower"
    return _cells(title, notes, result.heads, rows, "head", lowered=side == "lowered")


def ov(result: OvTokens, head: Any = None, prompt: int = 0) -> "Figure":
    """Draw the tokens that one head would write for each token of the span.

    Of a long span, the most attended tokens are shown, in their order.

    Args:
        result: The view.
        head: One of `result.heads`, by default the first.
        prompt: Number of the prompt.

    Returns:
        Figure: A plotly figure.

    Raises:
        HeadError: For a head that is not in the view.
        UsageError: For a prompt that is not in the view.
    """
    head = result.heads[0] if head is None else head
    read = result.of(head, prompt)
    kept = sorted(sorted(range(len(read)), key=lambda i: -read[i].attention)[:MAX_ROWS])
    names = [f"{spelled(read[i].token.text)}  {read[i].attention:.2f}" for i in kept]
    most_attended = f", {len(kept)} most attended of {len(read)}" if len(kept) < len(read) else ""
    notes = [
        f"tokens of {result.span}{most_attended}, with their attention",
        f"{result.copying(head):.0%} of those of all prompts are among the first {N_COPIED} that are written for them",
        SIGNS,
    ]
    rows = [read[i].writes for i in kept]
    return _cells(f"{Head.parse(head)}: tokens that it would write", notes, names, rows, "token read")


def spelled(text: str, plain: bool = False, width: int | None = None) -> str:
    """A token with visible spaces.

    Args:
        text: The token.
        plain: Leave the text unescaped.
        width: Number of characters to which it is cut.
    """
    shown = text.translate(SPACES)
    shown = shown if width is None or len(shown) <= width else shown[: width - 1] + "…"
    return shown if plain else safe(shown)


def _cells(
    title: str,
    notes: list[str],
    names: Sequence[str],
    rows: Sequence[Sequence[Token]],
    axis: str,
    lowered: bool = False,
) -> "Figure":
    import plotly.graph_objects as go

    size = [[-token.logit if lowered else token.logit for token in row] for row in rows]
    about = [
        [
            f"{name}<br>{spelled(token.text)}<br>{token.logit:+.3f} logits, rank {rank}"
            for rank, token in enumerate(row, 1)
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    ranks, most = len(rows[0]), max(max(row) for row in size)
    picture = go.Figure(
        go.Heatmap(
            z=size, x=list(range(1, ranks + 1)), y=list(range(len(rows))), customdata=about, xgap=2, ygap=2,
            text=[[spelled(token.text, width=MAX_CHARACTERS) for token in row] for row in rows],
            texttemplate="%{text}", textfont={"color": DARK, "size": 11}, hovertemplate="%{customdata}<extra></extra>",
            colorscale=PALE, zmin=0, zmax=most if most > 0 else 1,
            colorbar={
                "thickness": 10, "outlinewidth": 0, "nticks": 5,
                "title": {"text": "logits down" if lowered else "logits"},
            },
        )
    )  # fmt: skip
    picture.update_layout(**layout(title, notes, 30 * len(rows) + 130))
    picture.update_xaxes(title="rank", dtick=1, showgrid=False, zeroline=False)
    picture.update_yaxes(
        title={"text": axis, "standoff": 12}, range=[len(rows) - 0.5, -0.5], tickvals=list(range(len(rows))),
        ticktext=list(names), showgrid=False, zeroline=False,
    )  # fmt: skip
    return picture
