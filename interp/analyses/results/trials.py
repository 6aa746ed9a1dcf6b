"""Trials: a measure, prompt by prompt, under conditions; the result of every intervention experiment."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from interp.analyses.results import statistics
from interp.analyses.results.codec import result
from interp.analyses.results.result import Result
from interp.analyses.results.statistics import Estimate
from interp.errors import UsageError
from interp.hooks.model.heads import HeadSet
from interp.hooks.model.provenance import Provenance

BASELINE = "baseline"
"""condition of the unmodified model"""
RANDOM, RANDOM_BY_LAYER = "random", "random by layer"
"""conditions of random heads: drawn freely, and as many from each layer as the tested set has"""


@result
@dataclass(frozen=True)
class Trial:
    """One run of the model on all prompts of a task, under one condition."""

    condition: str
    """"baseline", "random", "random by layer", or the name of what is tested"""
    values: dict[str, tuple[float, ...]] = field(repr=False)
    """measure -> one number for each prompt"""
    heads: HeadSet = field(default_factory=lambda: HeadSet(()))
    """heads that are ablated or edited"""
    size: float = 0.0
    """number of heads, or share of the keys that is kept"""
    draw: int = 0
    """number of the random draw"""
    task: str = ""
    replies: tuple[str, ...] = field(default=(), repr=False)
    """text that the model generated, one a prompt"""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)
    """measure -> 95 % interval, for a measure that is no mean over prompts"""
    facts: dict[str, float] = field(default_factory=dict, repr=False)
    """other numbers about the run, such as the share of keys that was kept"""


@result
@dataclass(frozen=True, eq=False)
class Trials(Result):
    """All trials of one experiment.

    `mean` gives a measure under a condition with its 95 % interval, `gain` the difference between two conditions prompt
    by prompt, and `to_frame` the long table (condition, task, size, draw, measure, prompt, value).
    """

    name: str
    """what is tested, such as the name of an analysis"""
    trials: tuple[Trial, ...]
    intervention: str = ""
    """the ablation, such as "zero", or the edit"""
    title: str = ""
    """heading in reports; by default the name"""
    size_name: str = "heads"
    """what `size` counts"""
    shares: tuple[str, ...] = ()
    """measures that are shares from 0 to 1, printed in percent"""
    units: dict[str, str] = field(default_factory=dict)
    control: str = RANDOM
    """condition that the others are compared with"""
    questions: tuple[str, ...] = field(default=(), repr=False)
    answers: tuple[str, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    """sentences that belong to the numbers wherever they are shown"""
    seed: int = 0
    """seed of the intervals"""
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if not self.trials:
            raise UsageError(f"trials {self.name!r} are empty; give at least one trial.")

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions, in the order of the trials."""
        return tuple(dict.fromkeys(trial.condition for trial in self.trials))

    @property
    def tested(self) -> tuple[str, ...]:
        """Conditions that are neither the baseline nor random."""
        others = (BASELINE, RANDOM, RANDOM_BY_LAYER, self.control)
        return tuple(name for name in self.conditions if name not in others)

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(self.trials[0].values)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(trial.task for trial in self.trials))

    def sizes(self, condition: str) -> tuple[float, ...]:
        """Sizes under which a condition was tried, in the order of the trials."""
        return tuple(dict.fromkeys(trial.size for trial in self.trials if trial.condition == condition))

    def select(self, condition: str, size: float | None = None, task: str | None = None) -> tuple[Trial, ...]:
        """The trials of a condition, one for each draw and task.

        Args:
            condition: One of `conditions`.
            size: One of its sizes; may be left out where there is only one.
            task: One of `tasks`; None for all.

        Raises:
            UsageError: Where there is no such trial, or several sizes and none is given.
        """
        if condition not in self.conditions:
            raise UsageError(f"unknown condition {condition!r}; choose from {', '.join(map(repr, self.conditions))}.")
        sizes = self.sizes(condition)
        if size is None:
            if len(sizes) > 1:
                raise UsageError(f"condition {condition!r} has the sizes {_listed(sizes)}; name one as size=.")
            size = sizes[0]
        found = tuple(
            trial
            for trial in self.trials
            if (trial.condition, trial.size) == (condition, size) and task in (None, trial.task)
        )
        if not found:
            raise UsageError(
                f"no trial of {condition!r} with {self.size_name} {size:g} on {task or 'any task'}; its sizes are "
                f"{_listed(sizes)}, the tasks {', '.join(map(repr, self.tasks))}."
            )
        return found

    def mean(
        self, condition: str, measure: str | None = None, *, size: float | None = None, task: str | None = None
    ) -> Estimate:
        """Mean of a measure under a condition and its 95 % interval.

        The bootstrap resamples prompts, and draws of heads where there are several. Over several tasks, every task
        weighs the same and its prompts are resampled within it.

        Args:
            condition: One of `conditions`.
            measure: One of `measures`, by default the first.
            size: As in `select`.
            task: As in `select`.

        Returns:
            Estimate: mean, low, high.
        """
        measure = self._measure(measure)
        trials = self.select(condition, size, task)
        if len(trials) == 1 and measure in trials[0].intervals:
            return Estimate(trials[0].values[measure][0], *trials[0].intervals[measure])
        rows = [trial.values[measure] for trial in trials]
        if trials[0].task:
            return statistics.pooled_mean(rows, seed=self.seed)
        return statistics.mean_over_draws(rows, seed=self.seed)

    def gain(
        self,
        condition: str,
        measure: str | None = None,
        *,
        over: str | None = None,
        size: float | None = None,
        task: str | None = None,
    ) -> Estimate:
        """Mean over prompts of a measure under one condition minus another, each prompt with itself, and its interval.

        Draws of a condition are averaged first, and prompts are resampled.

        Args:
            condition: One of `conditions`.
            measure: One of `measures`, by default the first.
            over: The condition to compare with, by default `control`, of the same size.
            size: As in `select`.
            task: As in `select`.

        Returns:
            Estimate: mean, low, high of the difference.

        Limits:
            Says nothing about other draws of random heads.
        """
        measure, over = self._measure(measure), over or self.control
        one = self.select(condition, size, task)
        base = self.sizes(over)[0] if over == BASELINE and over in self.conditions else one[0].size
        other = self.select(over, base, task)
        rows, others = ([trial.values[measure] for trial in side] for side in (one, other))
        if one[0].task:
            differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(rows, others, strict=True)]
            return statistics.pooled_mean(differences, seed=self.seed)
        return statistics.paired_difference(rows, others, seed=self.seed)

    def _measure(self, measure: str | None) -> str:
        if measure is None:
            return self.measures[0]
        if measure not in self.measures:
            raise UsageError(f"unknown measure {measure!r}; choose from {', '.join(map(repr, self.measures))}.")
        return measure

    def rows(self, measure: str | None = None, task: str | None = None) -> list[dict[str, Any]]:
        """One row for each condition and size: mean and interval, and the gain over the control where there is one.

        Args:
            measure: One of `measures`, by default all of them.
            task: One of `tasks`; None for all tasks together.
        """
        found = []
        for condition in self.conditions:
            for size in self.sizes(condition):
                for name in self.measures if measure is None else (measure,):
                    mean, low, high = self.mean(condition, name, size=size, task=task)
                    row = {
                        "condition": condition,
                        "size": size,
                        "measure": name,
                        "mean": mean,
                        "low": low,
                        "high": high,
                    }
                    if condition in self.tested and size in self._control_sizes():
                        gain = self.gain(condition, name, size=size, task=task)
                        row |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
                    found.append(row)
        return found

    def _control_sizes(self) -> tuple[float, ...]:
        return self.sizes(self.control) if self.control in self.conditions else ()

    def to_frame(self) -> Any:
        """The long table as a pandas DataFrame: condition, task, size, draw, heads, measure, prompt, value."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "condition": trial.condition, "task": trial.task, "size": trial.size, "draw": trial.draw,
                    "heads": str(trial.heads) if len(trial.heads) else "", "measure": measure, "prompt": prompt,
                    "value": value,
                }
                for trial in self.trials
                for measure, values in trial.values.items()
                for prompt, value in enumerate(values)
            ]
        )  # fmt: skip

    def summary(self, top: int = 10) -> str:
        """One line for each condition, size and measure: mean [95 % interval]."""
        lines = []
        for row in self.rows():
            numbers = self.show(row["measure"], row["mean"], row["low"], row["high"])
            size = f"{row['size']:.0%}" if self.size_name.startswith("share") else f"{row['size']:g}"
            name = f"{row['condition']:18s} {size:>4s}"
            line = f"{name}  {row['measure']:16s} {numbers}"
            if "gain" in row:
                gain = self.show(row["measure"], row["gain"], row["gain_low"], row["gain_high"], signed=True)
                line += f"  {gain} over {self.control}"
            lines.append(line)
        return "\n".join(lines)

    def show(self, measure: str, mean: float, low: float, high: float, signed: bool = False) -> str:
        """Numbers of a measure as text, in percent for shares."""
        sign = "+" if signed else ""
        form = f"{sign}.0%" if measure in self.shares else f"{sign}.3f"
        return f"{mean:{form}} [{low:{form}}, {high:{form}}]"

    @classmethod
    def concat(cls, parts: Sequence["Trials"]) -> "Trials":
        """The trials of several tasks or batches in one result.

        Raises:
            UsageError: For no parts, or parts of different experiments.
        """
        if not parts:
            raise UsageError("no trials to join; give at least one part.")
        first = parts[0]
        for part in parts[1:]:
            for key in ("name", "intervention", "measures", "seed"):
                if getattr(part, key) != getattr(first, key):
                    raise UsageError(
                        f"trials differ in {key} ({getattr(first, key)!r} and {getattr(part, key)!r}); "
                        "join parts of one experiment."
                    )
        return replace(first, trials=tuple(trial for part in parts for trial in part.trials))

    def __str__(self) -> str:
        return self.summary()


def _listed(sizes: Sequence[float]) -> str:
    return ", ".join(f"{size:g}" for size in sizes)
