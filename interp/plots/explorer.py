"""The explorer: heads, the block map of one head, and its tokens, as HTML that needs no network."""

import json
import zlib
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.analyses.views.explore import SUMMARIES, Explored
from interp.errors import UsageError
from interp.hooks.writer import check_writable, write_atomic
from interp.plots.dispatch import figure
from interp.plots.style import SCALE, embed, layout, saving, visible

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

N_STEPS = 255
"""steps of a weight in a page: its square root is kept in multiples of 1 / 255"""
MARKS = {
    "needle": "needle: the sentence that holds the answer",
    "distractor": "distractors: other made-up facts",
}
"""span of a needle prompt -> its meaning"""
_START = (
    'interpExplorer(document.querySelector(".explorer"), JSON.parse(document.getElementById("explored").textContent));'
)


@dataclass(frozen=True, eq=False, repr=False)
class Explorer:
    """An explored prompt as HTML, which a notebook shows, `save` writes, and other pages embed.

    A page that embeds it takes `style()` and `script()` once and, for each panel, the HTML of `panel()` and `data()` in
    a <script type="application/json">. It then calls `interpExplorer(panel, JSON.parse(text))`. The event "interp:head"
    on a panel, with detail "L5H3", selects that head.
    """

    explored: Explored
    """the view that is shown"""
    height: int = 960
    """height of the frame in a notebook, in pixels"""

    @property
    def title(self) -> str:
        """Heading of the panel."""
        return self.explored.title or "Attention on one prompt"

    @property
    def facts(self) -> list[str]:
        """Model, tokens, heads and top keys, as short texts."""
        explored, origin = self.explored, self.explored.provenance
        heads, k = len(explored.heads), explored.keys.shape[-1]
        of = f"{heads} {'head' if heads == 1 else 'heads'}"
        kept = f"the {k} most attended keys of each query in {of}" if heads else "no keys stored"
        facts = [
            f"{len(explored.tokens):,} tokens in blocks of {explored.block}",
            f"{explored.layout.layers} layers × {explored.layout.heads} heads",
            kept,
        ]
        return [origin.model or origin.architecture, *facts] if origin is not None else facts

    @staticmethod
    def style() -> str:
        """CSS, all of it below .explorer; it uses the variables of the page (--ink, --page ...) where there are any."""
        return _own("explorer.css")

    @staticmethod
    def script() -> str:
        """JavaScript: the function `interpExplorer(root, data)`, and the functions of `saving`."""
        return saving() + _own("explorer.js")

    def data(self) -> str:
        """JSON for a script element; invisible characters are written as symbols or codes.

        A weight w of a map or a top key is one byte, `round(255 sqrt(w))`. Its error is at most 0.004, that of a small
        weight `4e-6 + sqrt(w) / 255`, and no weight above 4e-6 becomes 0. Summaries are float32, and positions are
        exact. Maps hold no keys after the query. Arrays are base64 of zlib, bytes of equal rank together.
        """
        explored = self.explored
        n = explored.maps.shape[-1]
        queries = torch.arange(len(explored.tokens))[:, None]
        # distance to the key plus one, 0 for none
        back = torch.where(explored.keys < 0, 0, queries - explored.keys + 1)
        width = "<u2" if len(explored.tokens) < 1 << 16 else "<u4"
        shown = {
            "layers": explored.layout.layers,
            "heads": explored.layout.heads,
            "block": explored.block,
            "k": explored.keys.shape[-1],
            "mapped": [str(head) for head in explored.mapped],
            "chosen": [str(head) for head in explored.heads],
            "summaries": {name: pack(explored.summaries[name], "<f4") for name in SUMMARIES},
            "maps": pack(_steps(explored.maps[:, *torch.tril_indices(n, n)]), "u1"),
            "back": pack(back.movedim(-1, 1), width),
            "probs": pack(_steps(explored.probs).movedim(-1, 1), "u1"),
            "title": visible(self.title),
            "tokens": [visible(token) for token in explored.tokens],
            "marks": {visible(name): ranges for name, ranges in explored.marks.items() if ranges},
            "about": SUMMARIES,
            "scale": [colour for _, colour in SCALE],
        }
        return embed(json.dumps(shown, allow_nan=False, ensure_ascii=False, separators=(",", ":")))

    def panel(self) -> str:
        """The HTML of the panel, without data, style and script."""
        from markupsafe import Markup

        return Markup(self._render(page=False))

    def page(self) -> str:
        """A whole page, which opens offline and runs only its own script."""
        from markupsafe import Markup

        script = f"{self.script()}{_START}"
        allowed = f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"
        parts = {"style": self.style(), "script": script, "data": self.data(), "allowed": allowed}
        return self._render(page=True, **{name: Markup(part) for name, part in parts.items()})

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all.

        Args:
            path: File name of the page.

        Returns:
            The path.

        Raises:
            UsageError: Where it cannot be written.
        """
        check_writable(path, UsageError)
        return write_atomic(path, self.page().encode(), UsageError)

    def _repr_html_(self) -> str:
        """A frame, so that neither styles nor text of the prompt reach the notebook."""
        allowed = "allow-scripts allow-downloads"
        size = f"width:100%;height:{int(self.height)}px;border:0"
        return (
            f'<iframe title="Attention explorer" sandbox="{allowed}" style="{size}" srcdoc="{escape(self.page())}">'
            "</iframe>"
        )

    def __repr__(self) -> str:
        return f"Explorer({self.explored!r})"

    def _render(self, **more: object) -> str:
        from jinja2 import Environment, StrictUndefined

        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
            # a plain str is text from outside; Markup is HTML that was made here
            finalize=lambda value: visible(value) if type(value) is str else value,
        )  # fmt: skip
        context = {
            "title": self.title,
            "facts": [visible(fact) for fact in self.facts],
            "summaries": SUMMARIES,
            "chosen": len(self.explored.heads),
            "marks": [visible(name) for name, ranges in self.explored.marks.items() if ranges],
            "explained": [text for name, text in MARKS.items() if self.explored.marks.get(name)],
            "steps": N_STEPS,
        }
        return environment.from_string(_own("explorer.html.j2")).render(context | more)


@figure.register(Explored)
def _(result: Explored) -> "Figure":
    return block_map(result)


def block_map(explored: Explored, head: Any = None) -> "Figure":
    """Draw the block map of one head: queries from top to bottom, keys from left to right.

    Colours grow with the square root of the attention, from 0 to the largest outside the first block of keys.

    Args:
        explored: The result of `explore`.
        head: One of `explored.mapped`, by default the first head with top keys.

    Returns:
        Figure: A plotly figure.

    Raises:
        HeadError: For a head without a block map.
    """
    import plotly.graph_objects as go

    if head is None:
        head = next((each for each in explored.heads if each in explored.mapped), explored.mapped.heads[0])
    weights = explored.map(head)
    inner = weights[:, 1:]
    largest = float(inner.max()) if inner.numel() and float(inner.max()) > 0 else 1.0
    edges = [block * explored.block for block in range(len(weights))]
    picture = go.Figure(
        go.Heatmap(
            z=weights.sqrt().numpy(), x=edges, y=edges, customdata=weights.numpy(), colorscale=SCALE, zmin=0,
            zmax=largest**0.5, showscale=False,
            hovertemplate="queries from %{y}, keys from %{x}<br>%{customdata:.3f}<extra></extra>",
        )
    )  # fmt: skip
    notes = [explored.title, f"blocks of {explored.block} tokens", "square-root scale"]
    picture.update_layout(**layout(f"{head}: attention by blocks", notes, 560))
    picture.update_xaxes(title="position of the key", showgrid=False)
    picture.update_yaxes(title="position of the query", autorange="reversed", showgrid=False)
    return picture


def explorer(explored: Explored, height: int = 960) -> Explorer:
    """Show an explored prompt: a table of all heads leads to the block map of a head, and the map to its tokens.

    Heads are layers from left to right and heads from top to bottom, coloured by a summary from 0 to its largest value.
    Blocks are queries from top to bottom and keys from left to right: the mean attention of a block in shares of the
    row, on a square-root scale from 0 to the largest value outside the first block of keys. Tokens are the text of a
    block of queries and of a block of keys, with the top keys of each query where they were kept.

    Args:
        explored: The result of `explore`.
        height: Height of the frame in a notebook, in pixels.

    Returns:
        Explorer: It shows itself in a notebook, and `save(path)` writes an HTML file that opens offline. Text from
        outside is shown as text and never run.

    Examples:
        >>> explored = interp.explore(model, prompts[:1], heads="L1H2", block=4)
        >>> interp.plots.explorer(explored).save(folder / "explorer.html").name
        'explorer.html'

    Limits:
        Shows only what was kept. A block is a mean, and keys outside of the top k of a query have no weight.
    """
    return Explorer(explored, height)


def _own(name: str) -> str:
    return files("interp.plots").joinpath(name).read_text(encoding="utf-8")


def _steps(weights: Tensor) -> Tensor:
    return (weights.clamp(0, 1).sqrt() * N_STEPS).round()


def pack(values: Tensor, kind: str) -> str:
    """Numbers as base64 of zlib, bytes of equal rank together, which makes them smaller.

    Args:
        values: The numbers.
        kind: Their type, as numpy writes it, such as "<f4".
    """
    flat: Any = np.ascontiguousarray(values.numpy().astype(kind)).reshape(-1)
    planes = flat.view(np.uint8).reshape(-1, flat.itemsize).T
    return b64encode(zlib.compress(planes.tobytes(), 9)).decode()
