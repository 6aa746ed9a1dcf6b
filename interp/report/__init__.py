"""One HTML file about the results of a run; it opens offline, and no text in it can run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp import plots
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.head_roles import HeadRoles, head_roles, threshold_of
from interp.errors import RunError
from interp.hooks.writer import check_writable, write_atomic
from interp.report import words
from interp.report.compared import compared
from interp.report.heads import MAX_CARDS, N_EACH, cards
from interp.report.methods import Method, method_of, settings_words
from interp.report.page import Page, Section, about, title_of
from interp.report.roles import rows_of
from interp.report.sections import section
from interp.report.words import CONTROL
from interp.runs.results import RunResults

__all__ = ["Page", "Section", "about", "make_report", "render", "section"]


@dataclass(frozen=True)
class Shown:
    """A section as the page takes it."""

    anchor: str
    title: str
    method: Method
    body: str
    digest: str
    control: str
    """HTML of the control of the result; empty for none"""
    control_settings: str
    """settings of the control, in one line"""
    is_table: bool
    """whether it shows a score table"""


def make_report(results: RunResults, path: str | Path) -> Path:
    """Write the results of a run as one HTML page that opens offline.

    The page is written whole or not at all. It holds plotly.js (4.8 MB), and its policy lets the browser run no other
    script and load nothing. Text from outside (model name, prompts, replies, labels, command) is escaped.

    Args:
        results: The results, as `Run.finish` or `read_results` give them.
        path: File name of the page.

    Returns:
        The path.

    Raises:
        RunError: For no results, for scores of another shape than the model, or where the file cannot be written.
        ScoreError: For results of another model.
    """
    _check(results)
    check_writable(path, RunError)
    return write_atomic(path, render(results).encode(), RunError)


def render(results: RunResults) -> str:
    """The page as text.

    Args:
        results: The results of a run.
    """
    page = Page(results)
    roles = _roles(results.scores)
    context: dict[str, Any] = {
        "results": results,
        "origin": results.provenance,
        "date": words.date(results.provenance.time),
        "duration": words.duration(results.seconds),
        "atlas": page.figure(plots.atlas(roles)) if roles is not None else None,
        "roles": rows_of(roles) if roles is not None else [],
        "sections": _sections(results, page),
        "compared": compared(results.scores, page),
        "cards": cards(results, roles),
        "most": {"each": N_EACH, "cards": MAX_CARDS},
        "missing": [(title_of(name), reason) for name, reason in results.missing.items()],
        "provenance": words.provenance(results),
    }
    # plain text: HTML would escape what is joined to it
    return str(page.render("report.html.j2", **context, **page.assets()))


def _sections(results: RunResults, page: Page) -> list[Shown]:
    """Score tables first, then all other results, each in the order of the run, each with its control."""
    names = [name for name in results if not (name.endswith(CONTROL) and name.removesuffix(CONTROL) in results)]
    names.sort(key=lambda name: not isinstance(results[name], HeadScores))
    found = []
    for number, name in enumerate(names, 1):
        shown = section(results[name], name, page)
        control = results.control(name)
        tested = None if control is None else section(control, f"{name}{CONTROL}", page)
        found.append(
            Shown(
                anchor=f"r{number}",
                title=shown.title,
                method=method_of(results, name),
                body=shown.body,
                digest=shown.digest,
                control="" if tested is None else tested.body,
                control_settings=settings_words(control, f"{name}{CONTROL}"),
                is_table=isinstance(results[name], HeadScores),
            )
        )
    return found


def _check(results: RunResults) -> None:
    if not len(results):
        raise RunError("the run has no results; run at least one analysis before making a report.")
    for name, found in results.items():
        if isinstance(found, HeadScores) and (found.layers, found.n_heads) != (
            results.layout.layers,
            results.layout.heads,
        ):
            raise RunError(
                f"the scores '{name}' have {found.layers} layers x {found.n_heads} heads, the model "
                f"{results.layout.layers} x {results.layout.heads}; report the scores of one model."
            )
        provenance = getattr(found, "provenance", None)
        if provenance is not None:
            results.provenance.check_model(provenance)


def _roles(scores: dict[str, HeadScores]) -> HeadRoles | None:
    """Heads sorted into roles, where any table has a threshold."""
    return head_roles(scores) if any(threshold_of(name, table) is not None for name, table in scores.items()) else None
