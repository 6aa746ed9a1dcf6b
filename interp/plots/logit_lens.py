"""Figures of what heads write: a token in each cell."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from interp.analyses.views.logit_lens import COPIED, LogitLens, OvTokens, Token
from interp.errors import UsageError
from interp.hooks.model.heads import Head
from interp.plots.style import SCALE, layout, safe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WIDE = 11
"""characters of a token that a cell has room for"""
MOST = 30
"""rows of a figure that can be read"""
# light enough for dark text on every cell
PALE = tuple((2 * at, colour) for at, colour in SCALE if at <= 0.5)
DARK = "#1d2430"
SPACES = str.maketrans({" ": "\u00b7", "\n": "\u21b5", "\t": "\u2192", "\r": "\u240d"})
SIGNS = "· space, ↵ new line"


def logit_lens(result: LogitLens, prompt: int = 0, side: Literal["raised", "lowered"] = "raised") -> "Figure":
    """The tokens that each head raises most in one prompt, or lowers, darker the more it does. Raises UsageError."""
    if side not in ("raised", "lowered"):
        raise UsageError(f"side={side!r}: take 'raised' or 'lowered'.")
    if not 0 <= prompt < len(result.labels):
        raise UsageError(f"prompt {prompt} of {len(result.labels)}: give a number from 0 to {len(result.labels) - 1}.")
    rows = getattr(result, side)[prompt]
    through = "unembedding" if result.lens is None else f"unembedding, layer {result.lens} by its lens"
    place = result.queries[prompt]
    said = [
        result.labels[prompt],
        f"written at {spelled(place.text, plain=True)} (position {place.position})",
        f"in logits, by the {through}",
        SIGNS,
    ]
    title = "Tokens that heads raise" if side == "raised" else "Tokens that heads lower"
    return _cells(title, said, result.heads, rows, "head", lowered=side == "lowered")


def ov(result: OvTokens, head: Any = None, prompt: int = 0) -> "Figure":
    """What one head would write for each token of the span, the first head by default; the most attended tokens of a
    long span, in their order. Raises HeadError, UsageError."""
    head = result.heads[0] if head is None else head
    read = result.of(head, prompt)
    kept = sorted(sorted(range(len(read)), key=lambda i: -read[i].attention)[:MOST])
    names = [f"{spelled(read[i].token.text)}  {read[i].attention:.2f}" for i in kept]
    left = f", {len(kept)} most attended of {len(read)}" if len(kept) < len(read) else ""
    said = [
        f"tokens of {result.span}{left}, with the attention they get",
        f"{result.copying(head):.0%} of those of all prompts are among the first {COPIED} written for them",
        SIGNS,
    ]
    rows = [read[i].writes for i in kept]
    return _cells(f"{Head.parse(head)}: what it reads, and would write", said, names, rows, "token read")


def spelled(text: str, plain: bool = False, wide: int | None = None) -> str:
    """A token so that its spaces are seen; cut to `wide` characters. plain: not escaped yet."""
    shown = text.translate(SPACES)
    shown = shown if wide is None or len(shown) <= wide else shown[: wide - 1] + "…"
    return shown if plain else safe(shown)


def _cells(
    title: str, said: list[str], names: Sequence[str], rows: Sequence[Sequence[Token]], axis: str, lowered: bool = False
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
    figure = go.Figure(
        go.Heatmap(
            z=size, x=list(range(1, ranks + 1)), y=list(range(len(rows))), customdata=about, xgap=2, ygap=2,
            text=[[spelled(token.text, wide=WIDE) for token in row] for row in rows],
            texttemplate="%{text}", textfont={"color": DARK, "size": 11}, hovertemplate="%{customdata}<extra></extra>",
            colorscale=PALE, zmin=0, zmax=most if most > 0 else 1,
            colorbar={
                "thickness": 10, "outlinewidth": 0, "nticks": 5,
                "title": {"text": "logits down" if lowered else "logits"},
            },
        )
    )  # fmt: skip
    figure.update_layout(**layout(title, said, 30 * len(rows) + 130))
    figure.update_xaxes(title="rank", dtick=1, showgrid=False, zeroline=False)
    figure.update_yaxes(
        title={"text": axis, "standoff": 12}, range=[len(rows) - 0.5, -0.5], tickvals=list(range(len(rows))),
        ticktext=list(names), showgrid=False, zeroline=False,
    )  # fmt: skip
    return figure
