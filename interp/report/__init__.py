"""One HTML file that says what a run found; it opens offline, and no text in it can run."""

import json
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from html import unescape
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import plots
from interp.analyses.causal.curve import Curve
from interp.analyses.kv import KeyCurve, key_curve
from interp.analyses.results.files import write_atomic
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.head_roles import HeadRoles, cut_of, head_roles
from interp.controls import OF_LOOKING
from interp.errors import RunError, ScoreError
from interp.findings import Findings, Safety, Steered
from interp.plots.style import embed as embed
from interp.plots.style import saving
from interp.report import heads, refusals, views, words
from interp.report import kv as keys

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TOP = 10


def make_report(findings: Findings, path: str | Path) -> Path:
    """Write the findings as one HTML page that opens offline; returns its path.

    The page is written whole or not at all. It holds plotly.js (4.8 MB) and asks the browser to run no other script and
    to load nothing; every text from outside (model name, prompts, replies, labels, command) is escaped.
    Raises RunError without scores, for scores of another shape, and where the file cannot be written; ScoreError for
    scores of another model.
    """
    _check(findings)
    path = Path(path)
    page = render(findings).encode()
    if path.is_dir():
        raise RunError(f"{path} is a folder; give a file name for the report, such as {path / 'report.html'}.")
    try:
        write_atomic(path, page)
    except ScoreError as error:
        raise RunError(f"the report {error}") from error
    return path


def render(findings: Findings) -> str:
    """The page as text."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FunctionLoader(_own), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        # a plain str is text from somewhere; Markup is ours
        finalize=lambda value: plots.visible(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters |= {"number": plots.number, "cut": words.cut, "title": plots.title_of}
    drawn = _Figures()
    shown = [views.show(view) for view in findings.views]
    sorted_heads = _functions(findings.scores)
    explorer = plots.explorer(findings.explored) if findings.explored is not None else None
    # the explorer's function stands before the script that calls it
    own = (explorer.script() if explorer is not None else saving()) + _own("report.js")
    scripts = [get_plotlyjs(), own]
    context = {
        "findings": findings,
        "origin": findings.provenance,
        "date": words.date(findings.provenance.time),
        "duration": words.duration(findings.seconds),
        "atlas": drawn.add(plots.atlas(sorted_heads)) if sorted_heads is not None else None,
        "functions": heads.table(sorted_heads) if sorted_heads is not None else [],
        "depth": drawn.add(plots.depth(findings.scores)) if sorted_heads is not None else None,
        "cards": heads.cards(findings, sorted_heads),
        "explorer": explorer,
        "panel": Markup(explorer.panel()) if explorer is not None else "",
        "qk_projection": _joint(findings, drawn),
        "logit_lens": _vocabulary(findings, drawn),
        "explorer_data": Markup(explorer.data()) if explorer is not None else "",
        "summaries": [words.summary(scores, cut_of(name, scores)) for name, scores in findings.scores.items()],
        "causal_words": words.causal_words(findings),
        "sections": [
            _section(name, scores, findings.controls.get(name), words.top_of(findings), drawn)
            for name, scores in findings.scores.items()
        ],
        "scatter": _scatter(findings.scores, drawn),
        "overlaps": _overlaps(findings.scores),
        "causal": drawn.add(plots.causal(findings.causal)) if findings.causal else None,
        "replies": words.replies(findings.causal) if findings.causal else [],
        "steering": [_steering(told, drawn) for told in findings.steering],
        "keys": _keys(findings.keys, drawn) if findings.keys is not None else None,
        "safety": [_safety(told, drawn) for told in findings.safety],
        "views": shown,
        "provenance": words.provenance(findings),
        "style": Markup(_own("report.css") + (explorer.style() if explorer is not None else "")),
        "plotly": Markup(scripts[0]),
        "script": Markup(scripts[1]),
        "allowed": Markup(" ".join(f"'sha256-{b64encode(sha256(s.encode()).digest()).decode()}'" for s in scripts)),
        "figures": Markup(embed(f"[{','.join(drawn.json)}]")),
        "weights": Markup(embed(json.dumps([view.weights for view in shown]))),
        "top": TOP,
    }
    return environment.get_template("report.html.j2").render(context)


def _steering(told: Steered, drawn: "_Figures") -> dict[str, Any]:
    """What the section of one steering run shows."""
    return {
        "told": told,
        "words": words.steering_words(told),
        "figure": drawn.add(plots.causal(told.check)),
        "map": drawn.add(plots.gains(told.profile)) if told.profile is not None else None,
        "replies": words.replies(told.check),
    }


def _keys(curve: KeyCurve, drawn: "_Figures") -> dict[str, Any]:
    """What the section of the key selectors shows."""
    return {
        "about": words.parts_of(key_curve),
        "words": keys.said(curve),
        "favoured": keys.favoured(curve),
        "figure": drawn.add(plots.key_curve(curve)),
        "shares": curve.shares,
        "rows": keys.table(curve),
        "tasks": [drawn.add(plots.key_curve(curve, task)) for task in curve.tasks],
    }


def _safety(told: Safety, drawn: "_Figures") -> dict[str, Any]:
    """What the section of a safety run shows."""
    return {
        "words": refusals.safety_words(told),
        "figures": [
            drawn.add(plots.curve(curve, measure)) for curve in told.curves.values() for measure in refusals.SHOWN
        ],
        "groups": {kind: refusals.groups(rows) for kind, rows in told.groups.items()},
    }


@dataclass(frozen=True)
class RenderedFigure:
    """A figure of the page: its place in the embedded list, and its heading as text."""

    number: int
    title: str
    subtitle: str
    height: int


class _Figures:
    """The figures of one page, as JSON; headings are set in HTML, where they wrap."""

    def __init__(self) -> None:
        self.json: list[str] = []

    def add(self, figure: "Figure") -> RenderedFigure:
        layout: Any = figure.layout
        above = 44 if layout.legend.orientation == "h" else 12
        height = int(layout.height) - layout.margin.t + above
        drawn = RenderedFigure(
            len(self.json), unescape(layout.title.text), unescape(layout.title.subtitle.text), height
        )
        figure.update_layout(title=None, height=height, margin_t=above)
        self.json.append(str(figure.to_json()))
        return drawn


def _check(findings: Findings) -> None:
    views = (findings.influence, findings.explored, findings.joint, findings.vocabulary, findings.keys)
    if not findings.scores and not findings.steering and all(view is None for view in views):
        raise RunError("the findings hold no scores; run at least one analysis before making a report.")
    profiles = {f"{told.method} on {told.task}": told.profile for told in findings.steering if told.profile}
    for name, scores in {**findings.scores, **profiles}.items():
        if (scores.layers, scores.n_heads) != (findings.layers, findings.heads):
            raise RunError(
                f"the scores '{name}' are of {scores.layers} layers x {scores.n_heads} heads, the findings of "
                f"{findings.layers} x {findings.heads}; report the scores of one model."
            )
        if scores.provenance is not None:
            findings.provenance.check_model(scores.provenance)


def _own(name: str) -> str:
    return files("interp.report").joinpath(name).read_text(encoding="utf-8")


def _functions(scores: dict[str, HeadScores]) -> HeadRoles | None:
    """Heads sorted into functions, where any table says when a head has one."""
    return head_roles(scores) if any(cut_of(name, table) is not None for name, table in scores.items()) else None


def _section(name: str, scores: HeadScores, control: Curve | None, checked: str, drawn: _Figures) -> dict[str, Any]:
    top = scores.top(TOP)
    return {
        "title": plots.title_of(name),
        "about": words.about(name),
        "facts": words.facts(scores),
        "map": drawn.add(plots.head_map(scores)),
        "top": drawn.add(plots.top_heads(scores, TOP)) if top else None,
        "positions": drawn.add(plots.positions(scores)) if "positions" in scores.extras and top else None,
        "rows": [
            (head, *(float(t[head]) for t in (scores.values, scores.low, scores.high, scores.frequency)))
            for head in top
        ],
        "unit": scores.unit,
        "control": drawn.add(plots.curve(control, control.measures[0])) if control is not None else None,
        "control_words": words.control_words(name, control) if control is not None else "",
        "flattered": name not in OF_LOOKING,
        "checked": name.replace("_", " ") == checked,
    }


def _joint(findings: Findings, drawn: _Figures) -> list[RenderedFigure]:
    told = findings.joint
    return [] if told is None else [drawn.add(plots.qk_projection(told, head, color="position")) for head in told.heads]


def _vocabulary(findings: Findings, drawn: _Figures) -> list[RenderedFigure]:
    told = findings.vocabulary
    return [] if told is None else [drawn.add(plots.logit_lens(told, i)) for i in range(len(told.labels))]


def _scatter(scores: dict[str, HeadScores], drawn: _Figures) -> RenderedFigure | None:
    """Retrieval against induction, or else the first two analyses that score the same heads."""
    pairs = list(combinations(scores, 2))
    wanted = [pair for pair in pairs if set(pair) == {"retrieval", "induction"}]
    for one, other in wanted + pairs:
        shared = _shared(scores[one], scores[other])
        if shared > 1:
            return drawn.add(plots.scatter(scores[one], scores[other], min(TOP, shared)))
    return None


def _overlaps(scores: dict[str, HeadScores]) -> dict[str, Any] | None:
    """Heads shared by the tops of each two analyses, beside what chance gives."""
    if len(scores) < 2:
        return None
    tops = {name: set(table.top(TOP)) for name, table in scores.items()}
    size = len(next(iter(scores.values())))
    rows = [[None if one == other else len(tops[one] & tops[other]) for other in tops] for one in tops]
    common = [(head, [name for name in tops if head in tops[name]]) for head in sorted(set.union(*tops.values()))]
    return {
        "names": [plots.title_of(name) for name in tops],
        "rows": rows,
        "chance": min(TOP, size) ** 2 / size,
        "common": [(head, [plots.title_of(name) for name in names]) for head, names in common if len(names) > 1],
    }


def _shared(one: HeadScores, other: HeadScores) -> int:
    return int((~(one.values.isnan() | other.values.isnan())).sum())
