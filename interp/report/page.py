"""One page of a report: its figures, templates, styles and scripts."""

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from html import unescape
from importlib.resources import files
from itertools import count
from typing import TYPE_CHECKING, Any

from interp import plots
from interp.analyses import registry
from interp.plots.style import embed, saving
from interp.report import words
from interp.report.words import title_of
from interp.runs.results import RunResults

if TYPE_CHECKING:
    from jinja2 import Environment
    from plotly.graph_objects import Figure

FIGURE_HEIGHT = 450
"""height in pixels of a figure that states none"""
ABOVE_LEGEND, ABOVE_PLOT = 44, 12
"""pixels between the top of a figure and its plot, with a legend above it and without"""


@dataclass(frozen=True)
class RenderedFigure:
    """A figure of the page: its number in the embedded list, and its heading as text."""

    number: int
    title: str
    subtitle: str
    height: int


@dataclass(frozen=True)
class Section:
    """The part of a page that shows one result."""

    title: str
    body: str
    """HTML below the heading"""
    digest: str = ""
    """HTML of its entry in the overview; empty for none"""


ABOUT = {
    "Method": "summary", "Limits": "limits", "Source": "source", "Differences from the source": "differs",
}  # fmt: skip
"""heading in a section -> part of the docstring"""


@dataclass(frozen=True, eq=False)
class Page:
    """A page while it is made: sections add figures, styles and scripts, and render their templates."""

    results: RunResults
    figures: list[str] = field(default_factory=list)
    """plotly figures as JSON"""
    styles: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=lambda: [saving()])
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def figure(self, drawn: "Figure") -> RenderedFigure:
        """Add a figure to the page; its heading is set in HTML, where it wraps.

        Args:
            drawn: A plotly figure.
        """
        layout: Any = drawn.layout
        margin = 70 if layout.margin.t is None else layout.margin.t
        above = ABOVE_LEGEND if layout.legend.orientation == "h" else ABOVE_PLOT
        height = int(layout.height or FIGURE_HEIGHT) - int(margin) + above
        title, subtitle = (unescape(text or "") for text in (layout.title.text, layout.title.subtitle.text))
        rendered = RenderedFigure(len(self.figures), title, subtitle, height)
        drawn.update_layout(title=None, height=height, margin_t=above)
        self.figures.append(str(drawn.to_json()))
        return rendered

    def number(self) -> int:
        """A number that no other part of the page has, for names of form fields."""
        return next(self._numbers)

    def use(self, style: str, script: str) -> None:
        """Add CSS and JavaScript to the page, once.

        Args:
            style: CSS.
            script: JavaScript, which begins with that of `saving`.
        """
        if style not in self.styles:
            self.styles.append(style)
        if script not in self.scripts:
            self.scripts[0] = script if script.startswith(self.scripts[0]) else self.scripts[0] + script

    def render(self, template: str, **context: Any) -> str:
        """Render a template of this package as HTML; texts are escaped.

        Args:
            template: File name below `interp/report`.
            context: Names that the template uses.
        """
        from markupsafe import Markup

        return Markup(self._environment.get_template(template).render(page=self, **context))

    def assets(self) -> dict[str, Any]:
        """Style, scripts, the policy that allows these scripts alone, and the figures, as HTML."""
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs

        scripts = [get_plotlyjs(), "".join(self.scripts) + own_file("report.js")]
        hashes = [b64encode(sha256(script.encode()).digest()).decode() for script in scripts]
        return {
            "style": Markup("".join([own_file("report.css"), *self.styles])),
            "plotly": Markup(scripts[0]),
            "script": Markup(scripts[1]),
            "allowed": Markup(" ".join(f"'sha256-{found}'" for found in hashes)),
            "figures": Markup(embed(f"[{','.join(self.figures)}]")),
        }

    @cached_property
    def _environment(self) -> "Environment":
        from jinja2 import Environment, FunctionLoader, StrictUndefined

        environment = Environment(
            loader=FunctionLoader(own_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
            # a plain str is text from outside; Markup is HTML that was made here
            finalize=lambda value: plots.visible(value) if type(value) is str else value,
        )  # fmt: skip
        environment.filters |= {"number": plots.number, "p": plots.p_text, "cut": words.cut, "title": title_of}
        return environment


def about(name: str, kind: registry.Kind = "analysis") -> list[tuple[str, str]]:
    """The method of an analysis, its limits, source and differences, from its docstring; empty for an unknown name.

    Args:
        name: Name in `RunResults`, or of a variant of an analysis.
        kind: Kind of the entry.
    """
    entry = registry.find(name.rpartition("/")[2], kind)
    if entry is None:
        return []
    sections = entry.sections
    texts = ((heading, " ".join(sections.get(key, "").replace("`", "").split())) for heading, key in ABOUT.items())
    return [(heading, text[:1].upper() + text[1:]) for heading, text in texts if text]


def own_file(name: str) -> str:
    """The text of a file of this package.

    Args:
        name: Path below `interp/report`.
    """
    return files("interp.report").joinpath(name).read_text(encoding="utf-8")
