"""Figures of trials: points for conditions of one size, lines over the sizes of conditions that have several."""

from typing import TYPE_CHECKING, Any, get_args

from interp.analyses.results.intervals import Estimate
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER
from interp.analyses.results.trials import Trials
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind
from interp.hooks.model.heads import HeadSet
from interp.plots.dispatch import figure
from interp.plots.style import ABOVE, BLUE, GREY, LINES, ORANGE, layout, lines, safe, title_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DASHES = ("solid", "dash", "dot")
CONTROLS = {RANDOM: "dot", RANDOM_BY_LAYER: "dash"}
"""conditions of random heads -> how their line is dashed"""
N_LISTED = 12
"""heads that a hover lists"""


@figure.register(Trials)
def _(result: Trials) -> "Figure":
    return trials(result)


def trials(result: Trials, measure: str | None = None, task: str | None = None) -> "Figure":
    """Draw a measure under every condition with its 95 % interval.

    Where every condition has one size, conditions are rows: a diamond for the mean over all draws, and a small dot for
    each draw where there are several. Where a condition has several sizes, conditions are lines over the sizes. Random
    conditions are grey. A baseline of size 0 begins every line; one of another size is a thin horizontal line.

    Args:
        result: The trials.
        measure: One of `result.measures`, by default the first.
        task: One of `result.tasks`; None for the mean over all tasks.

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
    conditions = [name for name in result.conditions if _has(result, name, measure)]
    if not conditions:
        raise UsageError(f"unknown measure {measure!r}; choose from {', '.join(map(repr, result.measures))}.")
    drawn = _lines if any(len(result.sizes(name)) > 1 for name in conditions) else _rows
    return drawn(result, conditions, measure, task)


def _rows(result: Trials, conditions: list[str], measure: str, task: str | None) -> "Figure":
    """A row for each condition."""
    import plotly.graph_objects as go

    means = [result.mean(name, measure, task=task) for name in conditions]
    ticks, about = [], []
    dots: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
    for row, (name, mean) in enumerate(zip(conditions, means, strict=True)):
        drawn = result.select(name, task=task)
        draws = list(dict.fromkeys(trial.draw for trial in drawn))
        label = safe(_label(result, name))
        count = f" ({len(draws)} draws)" if len(draws) > 1 else ""
        ticks.append(f"{label}<br>{_number(result, measure, mean.mean)}{count}")
        about.append(f"{label}<br>{result.show(measure, *mean)}")
        for place, draw in enumerate(draws if len(draws) > 1 else ()):
            own = [trial for trial in drawn if trial.draw == draw]
            values = [value for trial in own for value in trial.values[measure]]
            dots["x"].append(sum(values) / len(values))
            dots["y"].append(row + 0.18 + 0.14 * place / max(len(draws) - 1, 1))
            dots["text"].append(f"{label}, draw {place + 1}: {_count(values, result.show)}<br>{listed(own[0].heads)}")
    colours = [ORANGE if name in result.tested else BLUE for name in conditions]
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
    notes = [*_notes(result, measure, task), *(["small dots: single draws"] if dots["x"] else [])]
    picture.update_layout(**layout(_title(result, measure, task), notes, 66 * len(means) + 120))
    picture.update_xaxes(title=_axis(result, measure))
    if measure in result.shares:
        picture.update_xaxes(range=[-0.03, 1.03], tickformat=".0%", dtick=0.25)
    picture.update_yaxes(
        tickvals=list(range(len(means))), ticktext=ticks, range=[len(means) - 0.4, -0.5], showgrid=False, zeroline=False
    )
    return picture


def _lines(result: Trials, conditions: list[str], measure: str, task: str | None) -> "Figure":
    """A line for each condition over its sizes."""
    import plotly.graph_objects as go

    picture = go.Figure()
    share = result.size_name.startswith("share")
    base = result.mean(BASELINE, measure, task=task) if BASELINE in conditions else None
    start = base is not None and result.sizes(BASELINE)[0] == 0
    place, widest = 0, [0.0, 0.0]
    for name in (name for name in conditions if name != BASELINE):
        sizes = sorted(result.sizes(name))
        rows = [result.mean(name, measure, size=size, task=task) for size in sizes]
        if start and base is not None:
            sizes, rows = [0, *sizes], [base, *rows]
        widest = [min(widest[0] or sizes[0], sizes[0]), max(widest[1], sizes[-1])]
        control = name in CONTROLS or name == result.control
        colour = GREY if control else LINES[place % len(LINES)]
        dash = CONTROLS.get(name, "dot") if control else DASHES[place // len(LINES) % len(DASHES)]
        place += not control
        labels = [f"{size:.0%}" if share else f"{size:g} {result.size_name}" for size in sizes]
        picture.add_scatter(
            x=sizes, y=[row.mean for row in rows], mode="lines+markers", name=safe(name),
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
    picture.update_layout(**layout(_title(result, measure, task), _notes(result, measure, task), 400))
    picture.update_layout(**ABOVE)
    picture.update_xaxes(title=lines(result.size_name, 60))
    if share:
        picture.update_xaxes(tickformat=".0%")
    picture.update_yaxes(title=_axis(result, measure), rangemode="tozero")
    if measure in result.shares:
        picture.update_yaxes(tickformat=".0%")
    return picture


def listed(heads: HeadSet) -> str:
    """The names of some heads, the first twelve where they are many."""
    names = [str(head) for head in heads]
    more = f" and {len(names) - N_LISTED} more" if len(names) > N_LISTED else ""
    return ", ".join(names[:N_LISTED]) + more


def _has(result: Trials, condition: str, measure: str) -> bool:
    """Whether a condition was measured so; the loss of a baseline, say, has no influence."""
    return all(measure in trial.values for trial in result.trials if trial.condition == condition)


def _label(result: Trials, condition: str) -> str:
    """A condition, with its size where it is tested."""
    size = result.sizes(condition)[0]
    if condition not in result.tested or not size:
        return condition
    return f"{condition}, {size:.0%}" if result.size_name.startswith("share") else f"{condition} {size:g}"


def _bars(rows: list[Estimate], colour: str) -> dict[str, Any]:
    return {
        "array": [row.high - row.mean for row in rows], "arrayminus": [row.mean - row.low for row in rows],
        "color": colour, "thickness": 1, "width": 3,
    }  # fmt: skip


def _title(result: Trials, measure: str, task: str | None) -> str:
    where = f", {task}" if task else ", mean over tasks" if len(result.tasks) > 1 else ""
    if result.title and len(result.measures) == 1:
        return f"{result.title}{where}"
    return f"{result.title or title_of(result.name)}: {measure}{where}"


def _notes(result: Trials, measure: str, task: str | None) -> list[str]:
    """The subtitle: ablation or edit, number of prompts, meaning of the bars."""
    first = next(trial.condition for trial in result.trials if measure in trial.values)
    chosen = result.select(first, result.sizes(first)[0], task)
    n = sum(len(trial.values[measure]) for trial in chosen if trial.draw == chosen[0].draw)
    draws = any(trial.draw != result.trials[0].draw for trial in result.trials)
    bars = "bars: 95 % interval" if chosen[0].intervals else "bars: 95 % interval over prompts"
    kind = result.intervention
    bars += " and draws" if draws and not chosen[0].task else ""
    return [f"{kind} ablation" if kind in get_args(AblationKind) else kind, f"{n} prompts" if n > 1 else "", bars]


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
