"""Trials: measures of each prompt under several conditions, the result of every experiment with interventions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from interp.analyses.results import statistics
from interp.analyses.results.codec import result
from interp.analyses.results.files import plain
from interp.analyses.results.reply_limit import sentence_of_trials
from interp.analyses.results.result import Result
from interp.analyses.results.statistics import Estimate
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER, Trial
from interp.errors import UsageError
from interp.hooks.model.provenance import Provenance


@result
@dataclass(frozen=True, eq=False)
class Trials(Result):
    """All trials of one experiment.

    `mean` gives a measure under a condition with its 95 % interval. `gain` gives the difference between two conditions
    prompt by prompt. `to_frame` gives the long table (condition, task, size, draw, measure, prompt, value).

    Raises:
        UsageError: If there are no trials, or a trial has no measure.
        ScoreError: If the settings cannot be written as JSON.

    Examples:
        >>> from interp.analyses.results.trial import Trial
        >>> from interp.analyses.results.trials import Trials
        >>> before = Trial("baseline", {"accuracy": (1.0, 1.0, 0.0)})
        >>> after = Trial("top", {"accuracy": (0.0, 1.0, 0.0)}, size=2)
        >>> Trials("retrieval", (before, after)).gain("top", over="baseline")
        Estimate(mean=-0.3333333333333333, low=-1.0, high=0.0)
    """

    name: str
    """what is tested, such as the name of an analysis"""
    trials: tuple[Trial, ...]
    """one for each condition, size, draw and task"""
    intervention: str = ""
    """the ablation, such as "zero", or the edit"""
    title: str = ""
    """heading in reports; by default the name"""
    size_name: str = "heads"
    """what `size` counts"""
    shares: tuple[str, ...] = ()
    """measures that are shares from 0 to 1, printed in percent"""
    units: dict[str, str] = field(default_factory=dict)
    """measure -> its unit"""
    control: str = RANDOM
    """condition that the others are compared with"""
    questions: tuple[str, ...] = field(default=(), repr=False)
    """question of each prompt, where prompts have one"""
    answers: tuple[str, ...] = field(default=(), repr=False)
    """expected answer of each prompt, where prompts have one"""
    notes: tuple[str, ...] = ()
    """sentences that belong to the numbers wherever they are shown"""
    seed: int = 0
    """seed of the intervals"""
    settings: dict[str, Any] = field(default_factory=dict)
    """settings of the experiment, as JSON returns them"""
    provenance: Provenance | None = None
    """the model, tokenizer and versions that the numbers come from"""

    def __post_init__(self) -> None:
        if not self.trials:
            raise UsageError(f"trials {self.name!r} are empty; give at least one trial.")
        for trial in self.trials:
            if not trial.values or not all(trial.values.values()):
                raise UsageError(
                    f"the trial {trial.condition!r} of {self.name!r} has no numbers; give one for each prompt."
                )
        object.__setattr__(self, "settings", plain(self.settings, f"settings of {self.name!r}"))

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
        """Names of the measures, in the order of the trials."""
        return tuple(dict.fromkeys(name for trial in self.trials for name in trial.values))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the trials; the empty name where there are none."""
        return tuple(dict.fromkeys(trial.task for trial in self.trials))

    def sizes(self, condition: str) -> tuple[float, ...]:
        """Sizes of a condition, in the order of the trials.

        Args:
            condition: One of `conditions`.

        Returns:
            The sizes.
        """
        return tuple(dict.fromkeys(trial.size for trial in self.trials if trial.condition == condition))

    def select(self, condition: str, size: float | None = None, task: str | None = None) -> tuple[Trial, ...]:
        """The trials of a condition, one for each draw and task.

        Args:
            condition: One of `conditions`.
            size: One of its sizes; may be left out where there is only one.
            task: One of `tasks`; None for all.

        Returns:
            The trials.

        Raises:
            UsageError: If there is no such trial, or the condition has several sizes and none is given.
        """
        if condition not in self.conditions:
            raise UsageError(f"unknown condition {condition!r}; choose from {', '.join(map(repr, self.conditions))}.")
        sizes = self.sizes(condition)
        if size is None:
            if len(sizes) > 1:
                raise UsageError(f"condition {condition!r} has the sizes {_listed(sizes)}; name one as size=.")
            size = next(iter(sizes))
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

        The bootstrap resamples prompts, and draws of random heads where there are several. Over several tasks, every
        task has the same weight and its prompts are resampled within it.

        Args:
            condition: One of `conditions`.
            measure: One of `measures`, by default the first.
            size: As in `select`.
            task: As in `select`.

        Returns:
            Estimate: mean, low, high. For a measure with an interval that the trials hold, such as an angle, the
            interval of a single trial; over several draws their mean, least and largest.

        Raises:
            UsageError: If there is no such trial or measure.
        """
        measure = self._measure(measure)
        trials = self.select(condition, size, task)
        rows = self._rows(trials, measure)
        if len(trials) == 1 and measure in trials[0].intervals:
            return Estimate(rows[0][0], *trials[0].intervals[measure])
        if any(measure in trial.intervals for trial in trials):
            draws = [row[0] for row in rows]
            return Estimate(sum(draws) / len(draws), min(draws), max(draws))
        if trials[0].task:
            return statistics.pooled_mean(_by_task(trials, rows), seed=self.seed)
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
            over: The condition to compare with, by default `control`, of the same size. The baseline has one size,
                which is compared with every size.
            size: As in `select`; of `over` where the condition is the baseline.
            task: As in `select`.

        Returns:
            Estimate: mean, low, high of the difference.

        Raises:
            UsageError: If there is no such trial or measure, the measure is not a mean over prompts, or the two
                conditions were not measured on the same prompts.

        Limits:
            The interval does not include other draws of random heads.
        """
        measure, over = self._measure(measure), over or self.control
        if condition == BASELINE in self.conditions:
            one, other = self.select(condition, self.sizes(condition)[0], task), self.select(over, size, task)
        else:
            one = self.select(condition, size, task)
            base = self.sizes(over)[0] if over == BASELINE and over in self.conditions else one[0].size
            other = self.select(over, base, task)
        rows, others = self._rows(one, measure), self._rows(other, measure)
        if any(measure in trial.intervals for trial in (*one, *other)):
            raise UsageError(f"{measure!r} is not a mean over prompts, so it has no paired gain; compare two means.")
        sides = _by_task(one, rows), _by_task(other, others)
        if [len(row) for row in sides[0]] != [len(row) for row in sides[1]]:
            raise UsageError(
                f"{condition!r} and {over!r} were not measured on the same prompts; compare conditions that share them."
            )
        if one[0].task:
            differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(*sides, strict=True)]
            return statistics.pooled_mean(differences, seed=self.seed)
        return statistics.paired_difference(rows, others, seed=self.seed)

    def _rows(self, trials: Sequence[Trial], measure: str) -> list[tuple[float, ...]]:
        if missing := [trial.condition for trial in trials if measure not in trial.values]:
            raise UsageError(f"condition {missing[0]!r} has no measure {measure!r}; its trials hold other measures.")
        return [trial.values[measure] for trial in trials]

    def _measure(self, measure: str | None) -> str:
        if measure is None:
            return self.measures[0]
        if measure not in self.measures:
            raise UsageError(f"unknown measure {measure!r}; choose from {', '.join(map(repr, self.measures))}.")
        return measure

    def rows(self, measure: str | None = None, task: str | None = None) -> list[dict[str, Any]]:
        """One row for each condition, size and measure.

        A row holds the mean and its interval. It also holds the gain over the control where a tested condition has a
        control of its size.

        Args:
            measure: One of `measures`, by default all of them.
            task: One of `tasks`; None for all tasks together.

        Returns:
            One dictionary for each row.
        """
        found = []
        for condition in self.conditions:
            for size in self.sizes(condition):
                held = {name for trial in self.select(condition, size) for name in trial.values}
                for name in self.measures if measure is None else (self._measure(measure),):
                    if name not in held:
                        continue
                    mean, low, high = self.mean(condition, name, size=size, task=task)
                    found.append(
                        {"condition": condition, "size": size, "measure": name, "mean": mean, "low": low, "high": high}
                    )
                    if condition in self.tested and size in self._control_sizes() and not self._has_interval(name):
                        gain = self.gain(condition, name, size=size, task=task)
                        found[-1] |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
        return found

    def _has_interval(self, measure: str) -> bool:
        return any(measure in trial.intervals for trial in self.trials)

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
        """One line for each condition, size and measure: mean [95 % interval]; then the replies cut by a limit."""
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
        ended = sentence_of_trials(self.trials, self.settings)
        return "\n".join([*lines, *([ended] if ended else [])])

    def show(self, measure: str, mean: float, low: float, high: float, signed: bool = False) -> str:
        """Numbers of a measure as text: shares in percent, differences of shares in points.

        Args:
            measure: One of `measures`.
            mean: The mean or difference.
            low: Lower end of its interval.
            high: Upper end of its interval.
            signed: Whether the numbers are a difference.

        Returns:
            The text.
        """
        if signed and measure in self.shares:
            return f"{100 * mean:+.0f} points [{100 * low:+.0f}, {100 * high:+.0f}]"
        form = ".0%" if measure in self.shares else "+.3f" if signed else ".3f"
        return f"{mean:{form}} [{low:{form}}, {high:{form}}]"

    @classmethod
    def concat(cls, parts: Sequence["Trials"]) -> "Trials":
        """The trials of several tasks, or of several batches of prompts, in one result.

        Trials of one condition, task, size and draw are batches: their prompts follow one another. Others stay apart.

        Args:
            parts: Trials of one experiment.

        Returns:
            Trials: the joined result.

        Raises:
            UsageError: If there are no parts, they are of different experiments, or a measure that is not a mean over
                prompts would have to be joined.
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
        joined: dict[Any, Trial] = {}
        for trial in (trial for part in parts for trial in part.trials):
            key = trial.condition, trial.task, trial.size, trial.draw
            joined[key] = _follow(joined[key], trial) if key in joined else trial
        texts = {
            name: tuple(text for part in parts for text in getattr(part, name)) for name in ("questions", "answers")
        }
        return replace(first, trials=tuple(joined.values()), **texts)

    def __str__(self) -> str:
        return self.summary()


def _listed(sizes: Sequence[float]) -> str:
    return ", ".join(f"{size:g}" for size in sizes)


def _by_task(trials: Sequence[Trial], rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """One row for each task: the mean over its draws, prompt by prompt."""
    found: dict[str, list[Sequence[float]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        found.setdefault(trial.task, []).append(row)
    return [[sum(column) / len(column) for column in zip(*draws, strict=True)] for draws in found.values()]


def _follow(one: Trial, other: Trial) -> Trial:
    """The prompts of one trial, then those of another of the same condition."""
    if one.heads != other.heads or one.intervals or other.intervals or one.values.keys() != other.values.keys():
        raise UsageError(
            f"trials of {one.condition!r} differ in heads or measures, or hold intervals; join batches of prompts only."
        )
    n, m = (len(next(iter(trial.values.values()))) for trial in (one, other))
    return replace(
        one,
        values={name: values + other.values[name] for name, values in one.values.items()},
        replies=one.replies + other.replies,
        facts={name: (n * x + m * other.facts.get(name, x)) / (n + m) for name, x in one.facts.items()},
    )
