"""The explorer: heads, the block map of one of them, and its tokens, in one piece of HTML that needs no network."""

import json
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path

from interp.analyses.results.files import write_atomic
from interp.analyses.views.explore import STEPS, SUMMARIES, Explored
from interp.errors import ScoreError, UsageError
from interp.plots.style import SCALE, embed, saving, visible

_START = (
    'interpExplorer(document.querySelector(".explorer"), JSON.parse(document.getElementById("explored").textContent));'
)


@dataclass(frozen=True, eq=False, repr=False)
class Explorer:
    """An explored prompt as HTML: a notebook shows it, `save` writes it, and its parts stand in other pages.

    Another page takes `style()` and `script()` once and, for each panel, the HTML of `panel()` and `data()` in a
    <script type="application/json">. It then calls interpExplorer(panel, JSON.parse(text)). The event "interp:head" on
    a panel, with detail "L5H3", selects that head.
    """

    explored: Explored
    height: int = 960
    """pixels of the frame in a notebook"""

    @property
    def title(self) -> str:
        return self.explored.title or "Attention on one prompt"

    @property
    def facts(self) -> list[str]:
        """What was read, in words."""
        told, origin = self.explored, self.explored.provenance
        heads, k = len(told.heads), told.keys.shape[-1]
        kept = f"top {k} keys of {heads} {'head' if heads == 1 else 'heads'}" if heads else "no top keys"
        said = [
            f"{len(told.tokens):,} tokens in blocks of {told.block}",
            f"{told.layout.layers} layers × {told.layout.heads} heads",
            kept,
        ]
        return [origin.model or origin.architecture, *said] if origin is not None else said

    @staticmethod
    def style() -> str:
        """CSS, all of it below .explorer; takes the variables of the page (--ink, --page ...) where it has them."""
        return _own("explorer.css")

    @staticmethod
    def script() -> str:
        """JavaScript: the function interpExplorer(root, data), and what `saving` has."""
        return saving() + _own("explorer.js")

    def data(self) -> str:
        """JSON that may stand in a script element; characters that cannot be seen are written as symbols or codes."""
        told = self.explored.to_dict()
        kept = ("layers", "heads", "block", "k", "mapped", "chosen", "summaries", "maps", "back", "probs")
        shown = {name: told[name] for name in kept} | {
            "title": visible(self.title),
            "tokens": [visible(token) for token in told["tokens"]],
            "marks": {visible(name): ranges for name, ranges in told["marks"].items() if ranges},
            "about": SUMMARIES,
            "scale": [colour for _, colour in SCALE],
        }
        return embed(json.dumps(shown, allow_nan=False, ensure_ascii=False, separators=(",", ":")))

    def panel(self) -> str:
        """The HTML of the panel, without data, style and script."""
        from markupsafe import Markup

        # templates of other pages take it as HTML
        return Markup(self._render(page=False))

    def page(self) -> str:
        """A whole page, which opens offline and runs no script but its own."""
        from markupsafe import Markup

        script = f"{self.script()}{_START}"
        allowed = f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"
        parts = {"style": self.style(), "script": script, "data": self.data(), "allowed": allowed}
        return self._render(page=True, **{name: Markup(part) for name, part in parts.items()})

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all; returns its path. Raises UsageError where it cannot be written."""
        path = Path(path)
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give a file name for the page, such as {path / 'explorer.html'}.")
        try:
            write_atomic(path, self.page().encode())
        except ScoreError as error:
            raise UsageError(f"the page {error}") from error
        return path

    def _repr_html_(self) -> str:
        """A frame of its own, so that neither styles nor text of the prompt reach the notebook."""
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
            # a plain str is text from somewhere; Markup is ours
            finalize=lambda value: visible(value) if type(value) is str else value,
        )  # fmt: skip
        context = {
            "title": self.title,
            "facts": [visible(fact) for fact in self.facts],
            "summaries": SUMMARIES,
            "chosen": len(self.explored.heads),
            "marks": [visible(name) for name, ranges in self.explored.marks.items() if ranges],
            "steps": STEPS,
        }
        return environment.from_string(_own("explorer.html.j2")).render(context | more)


def explorer(explored: Explored, height: int = 960) -> Explorer:
    """The explorer of one prompt: from a table of all heads to the block map of a head and to its tokens.

    heads: layers to the right, heads down, coloured by a summary from 0 to its largest value. Blocks: queries down,
    keys to the right, mean attention of a block in shares of the row, on a square-root scale from 0 to the largest
    outside of the first block of keys. Tokens: the text of a block of queries and of one of keys, with the top keys of
    each query where they were kept.
    height: pixels of the frame in a notebook. The result shows itself there, and `save(path)` writes one HTML file that
    opens offline, of the size of `Explored.save`'s. Text from outside is shown as text and never run.
    Cannot show: more than was kept: a block is a mean, and what is not among the k top keys of a query has no weight.
    """
    return Explorer(explored, height)


def _own(name: str) -> str:
    return files("interp.plots").joinpath(name).read_text(encoding="utf-8")
