"""Figures of trials: points for conditions of one size, lines over the sizes of conditions that have several."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch

from interp.analyses.results.intervals import Estimate
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER, RANDOM_KEPT, Trial
from interp.analyses.results.trial_rows import Group, groups, sized, sizes
from interp.analyses.results.trial_tests import mean_of
from interp.analyses.results.trials import Trials
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind
from interp.hooks.model.heads import HeadSet
from interp.plots.dispatch import figure
from interp.plots.style import ABOVE, BLUE, GREY, LINES, ORANGE, layout, lines, safe, title_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DASHES = ("solid", "dash", "dot")
CONTROLS = {RANDOM: "dot", RANDOM_BY_LAYER: "dash", RANDOM_KEPT: "dash"}
"""conditions of random heads -> how their line is dashed"""
MIN_BAND_SETS = 5
"""random sets of a size below which there is no band"""
N_LISTED = 12
"""heads that a hover lists"""


@figure.register(Trials)
def _(result: Trials) -> "Figure":
    kept = [name for name in result.tested if name in result.claims]
    return trials(result, leave_out=kept)


def trials(
    result: Trials, measure: str | None = None, task: str | None = None, leave_out: Sequence[str] = ()
) -> "Figure":
    """Draw a measure under every condition with its 95 % interval.

    Where every condition has one size, conditions are rows: a diamond for the mean over all draws, and a small dot for
    each draw where there are several. Where a condition has several sizes, conditions are lines over the sizes. Random
    conditions are grey. A band holds the means of the central 95 % of the random sets; where random sets are matched to
    several conditions, each condition has a band in its colour. A baseline of size 0 begins every line; one of another
    size is a thin horizontal line.

    Args:
        result: The trials.
        measure: One of `result.measures`, by default the first.
        task: One of `result.tasks`; None for the mean over all tasks.
        leave_out: Conditions that are not drawn, with the random sets that are matched to them.

    Returns:
        Figure: A plotly figure.

    Raises:
        UsageError: For a measure or task that the trials do not have.

    Examples:
        >>> from interp.analyses.results.trial import Trial
        >>> from interp.analyses.results.trials import Trials
        >>> before = Trial("baseline", {"accuracy": (1.0, 1.0)})
        >>> after = Trial("top", {"accuracy": (0.0, 1.0)}, size=2)
        >>> list(interp.plots.trials(Trials("retrieval", (before, after))).data[0].x)
        [1.0, 0.5]
    """
    measure = result.measures[0] if measure is None else measure
    if task is not None and task not in result.tasks:
        raise UsageError(f"unknown task {task!r}; choose from {', '.join(map(repr, result.tasks))}.")
    found = [
        group
        for group in groups(result)
        if not {group.condition, group.matched} & set(leave_out) and _has(result, group, measure)
    ]
    if not found:
        raise UsageError(f"unknown measure {measure!r}; choose from {', '.join(map(repr, result.measures))}.")
    drawn = _lines if result.is_sized else _rows
    return drawn(result, found, measure, task)


def _rows(result: Trials, found: list[Group], measure: str, task: str | None) -> "Figure":
    """A row for each condition."""
    import plotly.graph_objects as go

    # tested conditions of different sizes may share a baseline of size 0
    first = [sizes(result, group)[0] for group in found]
    means = [
        result.mean(group.condition, measure, size=size, task=task, matched=group.matched)
        for group, size in zip(found, first, strict=True)
    ]
    ticks, about, word = [], [], _draw_word(result)
    n_sizes = len({size for group, size in zip(found, first, strict=True) if group.condition in result.tested})
    dots: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
    for row, (group, size, mean) in enumerate(zip(found, first, means, strict=True)):
        drawn = result.select(group.condition, size, task, group.matched)
        draws = list(dict.fromkeys(trial.draw for trial in drawn))
        label = safe(_label(result, group, n_sizes > 1))
        count = f" ({len(draws)} {word}s)" if len(draws) > 1 else ""
        ticks.append(f"{label}<br>{_number(result, measure, mean.mean)}{count}")
        about.append(f"{label}<br>{result.show(measure, *mean)}")
        for place, draw in enumerate(draws if len(draws) > 1 else ()):
            own = [trial for trial in drawn if trial.draw == draw]
            values = [value for trial in own for value in trial.values[measure]]
            dots["x"].append(sum(values) / len(values))
            dots["y"].append(row + 0.18 + 0.14 * place / max(len(draws) - 1, 1))
            dots["text"].append(f"{label}, {word} {place + 1}: {_count(values, result.show)}<br>{listed(own[0].heads)}")
    colours = [ORANGE if group.condition in result.tested else BLUE for group in found]
    picture = go.Figure()
    picture.add_scatter(
        x=[mean.mean for mean in means], y=list(range(len(means))), mode="markers", name="condition", text=about,
        marker={"size": 12, "symbol": "diamond", "color": colours},
        error_x={
            "array": [mean.high - mean.mean for mean in means], "arrayminus": [mean.mean - mean.low for mean in means],
            "color": GREY, "thickness": 1.5, "width": 5,
        },
        hovertemplate="%{text}<extra></extra>", showlegend=False,
    )  # fmt: skip
    picture.add_scatter(
        **dots, mode="markers", name="draw", marker={"size": 7, "color": GREY, "opacity": 0.8},
        hovertemplate="%{text}<extra></extra>", showlegend=False,
    )  # fmt: skip
    notes = [*_notes(result, measure, task), *([f"small dots: single random {word}s"] if dots["x"] else [])]
    picture.update_layout(**layout(_title(result, measure, task), notes, 66 * len(means) + 120))
    picture.update_xaxes(title=_axis(result, measure))
    if measure in result.shares:
        picture.update_xaxes(range=[-0.03, 1.03], tickformat=".0%", dtick=0.25)
    picture.update_yaxes(
        tickvals=list(range(len(means))), ticktext=ticks, range=[len(means) - 0.4, -0.5], showgrid=False, zeroline=False
    )
    return picture


def _lines(result: Trials, found: list[Group], measure: str, task: str | None) -> "Figure":
    """A line for each condition over its sizes."""
    import plotly.graph_objects as go

    picture = go.Figure()
    share = result.size_name.startswith("share")
    has_base = any(group.condition == BASELINE for group in found)
    base = result.mean(BASELINE, measure, task=task) if has_base else None
    start = base is not None and result.sizes(BASELINE)[0] == 0
    widest, colours, banded = [0.0, 0.0], _colours(result, found), False
    for group in (group for group in found if group.condition != BASELINE):
        name, drawn = group.label, sorted(sizes(result, group))
        rows = [result.mean(group.condition, measure, size=x, task=task, matched=group.matched) for x in drawn]
        colour, dash = colours[group]
        if len(bands := _bands(result, group, drawn, measure, task)) == len(drawn):
            _add_band(picture, drawn, bands, colour, f"{name}, central 95 %")
            banded = True
        if group.matched:
            # its band says it all
            continue
        if start and base is not None:
            drawn, rows = [0, *drawn], [base, *rows]
        widest = [min(widest[0] or drawn[0], drawn[0]), max(widest[1], drawn[-1])]
        labels = [f"{size:.0%}" if share else f"{size:g} {result.size_name}" for size in drawn]
        picture.add_scatter(
            x=drawn, y=[row.mean for row in rows], mode="lines+markers", name=safe(name),
            line={"color": colour, "dash": dash, "width": 2}, marker={"size": 6}, error_y=_bars(rows, colour),
            text=[f"{safe(name)}, {safe(size)}<br>{result.show(measure, *row)}"
                  for size, row in zip(labels, rows, strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    if base is not None and not start:
        picture.add_scatter(
            x=widest, y=[base.mean, base.mean], mode="lines", name=BASELINE, line={"color": GREY, "width": 1},
            hovertemplate=f"{BASELINE}: {result.show(measure, *base)}<extra></extra>",
        )  # fmt: skip
    notes = [*_notes(result, measure, task), *(["bands: central 95 % of the random sets"] if banded else [])]
    picture.update_layout(**layout(_title(result, measure, task), notes, 400))
    picture.update_layout(**ABOVE)
    picture.update_xaxes(title=lines(result.size_name, 60))
    if share:
        picture.update_xaxes(tickformat=".0%")
    picture.update_yaxes(title=_axis(result, measure), rangemode="tozero")
    if measure in result.shares:
        picture.update_yaxes(tickformat=".0%")
    return picture


def _colours(result: Trials, found: list[Group]) -> dict[Group, tuple[str, str]]:
    """Colour and dash of the line of each group. Random heads are grey, or have the colour of their condition."""
    made: dict[str, tuple[str, str]] = {}
    for group in found:
        if group.condition not in (*CONTROLS, BASELINE, result.control):
            place = len(made)
            made[group.condition] = LINES[place % len(LINES)], DASHES[place // len(LINES) % len(DASHES)]

    def colour(group: Group) -> tuple[str, str]:
        dash = CONTROLS.get(group.condition, "dot")
        return made.get(group.condition) or (made.get(group.matched or "", (GREY, ""))[0], dash)

    return {group: colour(group) for group in found}


def _bands(
    result: Trials, group: Group, drawn: Sequence[float], measure: str, task: str | None
) -> list[tuple[float, float]]:
    """The central 95 % of the means of the random sets of each size; nothing where a size has fewer than 5 sets."""
    found = []
    for size in drawn if group.condition in (RANDOM_BY_LAYER, RANDOM_KEPT) else ():
        sets: dict[int, list[Trial]] = {}
        for trial in result.select(group.condition, size, task, group.matched):
            sets.setdefault(trial.draw, []).append(trial)
        if len(sets) >= MIN_BAND_SETS:
            means = torch.tensor([mean_of(trials, measure) for trials in sets.values()], dtype=torch.float64)
            found.append(tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()))
    return found


def _add_band(picture: "Figure", x: Sequence[float], bands: list[tuple[float, float]], colour: str, name: str) -> None:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    ends = [*(low for low, _ in bands), *(high for _, high in reversed(bands))]
    picture.add_scatter(
        x=[*x, *reversed(x)], y=ends, mode="lines", line={"width": 0, "color": colour}, fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.15)", name=safe(name), showlegend=False, hoverinfo="skip",
    )  # fmt: skip


def listed(heads: HeadSet) -> str:
    """The names of some heads, the first twelve where they are many."""
    names = [str(head) for head in heads]
    more = f" and {len(names) - N_LISTED} more" if len(names) > N_LISTED else ""
    return ", ".join(names[:N_LISTED]) + more


def _has(result: Trials, group: Group, measure: str) -> bool:
    """Whether a condition was measured so; the loss of a baseline, say, has no influence."""
    return all(measure in trial.values for trial in result.trials if trial.condition == group.condition)


def _label(result: Trials, group: Group, with_size: bool) -> str:
    """A condition, with its size where tested conditions differ in it."""
    size, condition = sizes(result, group)[0], group.label
    if group.condition not in result.tested or not size or not with_size:
        return condition
    return f"{condition} ({sized(result, size)})"


def _draw_word(result: Trials) -> str:
    """Name of a random draw: a set where heads are drawn."""
    return "set" if result.size_name == "heads" else "draw"


def _bars(rows: list[Estimate], colour: str) -> dict[str, Any]:
    return {
        "array": [row.high - row.mean for row in rows], "arrayminus": [row.mean - row.low for row in rows],
        "color": colour, "thickness": 1, "width": 3,
    }  # fmt: skip


def _title(result: Trials, measure: str, task: str | None) -> str:
    where = f", {task}" if task else ", mean over tasks" if len(result.tasks) > 1 else ""
    if result.title and len(result.measures) == 1:
        return f"{result.title}{where}"
    # the title of a control names its first measure
    _, ablated, rest = result.title.partition(" with heads ablated")
    if ablated:
        return f"{measure[:1].upper()}{measure[1:]}{ablated}{rest}{where}"
    return f"{result.title or title_of(result.name)}: {measure}{where}"


def _notes(result: Trials, measure: str, task: str | None) -> list[str]:
    """The subtitle: ablation or edit, number of prompts, meaning of the bars."""
    first = next(trial.condition for trial in result.trials if measure in trial.values)
    chosen = result.select(first, result.sizes(first)[0], task)
    n = sum(len(trial.values[measure]) for trial in chosen if trial.draw == chosen[0].draw)
    draws = any(trial.draw != result.trials[0].draw for trial in result.trials)
    bars = "bars: 95 % interval" if chosen[0].intervals else "bars: 95 % interval over prompts"
    kind = result.intervention
    bars += f" and random {_draw_word(result)}s" if draws and not chosen[0].task else ""
    if kind in get_args(AblationKind):
        others = tuple(f" ({other})" for other in get_args(AblationKind))
        unless = " unless named otherwise" if any(name.endswith(others) for name in result.tested) else ""
        kind = f"{kind} ablation{unless}"
    return [kind, f"{n} prompts" if n > 1 else "", bars]


def _axis(result: Trials, measure: str) -> str:
    unit = result.units.get(measure, "")
    return lines(f"{measure}, {unit}" if unit else measure)


def _number(result: Trials, measure: str, value: float) -> str:
    return f"{value:.0%}" if measure in result.shares else f"{value:.3f}"


def _count(values: list[float], show: Any) -> str:
    """A draw in words: how many prompts are right where all verdicts are 0 or 1, else the mean."""
    if all(value in (0, 1) for value in values):
        return f"{int(sum(values))} of {len(values)}"
    return f"mean {sum(values) / len(values):.3f}"
