"""Trials: measures of each prompt under several conditions, the result of every experiment with interventions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.analyses.results import intervals
from interp.analyses.results.codec import result
from interp.analyses.results.files import plain
from interp.analyses.results.intervals import SHARE, SHARE_DIFFERENCE, Estimate
from interp.analyses.results.joined_trials import joined
from interp.analyses.results.reply_limit import sentence_of_trials
from interp.analyses.results.result import Result
from interp.analyses.results.set_test import Claim, SetTest
from interp.analyses.results.shown_behaviour import n_items, sentences_of_counted
from interp.analyses.results.trial import BASELINE, DRAWN, RANDOM, Trial, by_task
from interp.analyses.results.trial_rows import frame, rows
from interp.analyses.results.trial_tests import findings, tested_set
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
        Estimate(mean=-0.3333333333333333, low=-1.7..., high=1.1...)
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
    claim: Claim | None = None
    """how tested heads are claimed to differ from random heads; None where no random heads are drawn"""
    claims: dict[str, Claim] = field(default_factory=dict)
    """condition -> its claim, where it is another one"""
    n_random_sets: int = 0
    """number of random head sets that were planned for a test"""
    questions: tuple[str, ...] = field(default=(), repr=False)
    """question of each prompt, where prompts have one"""
    answers: tuple[str, ...] = field(default=(), repr=False)
    """expected answer of each prompt, where prompts have one"""
    notes: tuple[str, ...] = ()
    """sentences that belong to the numbers wherever they are shown"""
    seed: int = 0
    """seed of the confidence intervals"""
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
        others = (BASELINE, *DRAWN, self.control)
        return tuple(name for name in self.conditions if name not in others)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures, in the order of the trials."""
        return tuple(dict.fromkeys(name for trial in self.trials for name in trial.values))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the trials; the empty name where there are none."""
        return tuple(dict.fromkeys(trial.task for trial in self.trials))

    @property
    def is_sized(self) -> bool:
        """Whether a condition has several sizes, other than random heads that are matched to conditions."""
        names = self.tested or self.conditions
        return any(len(self.sizes(name)) > 1 for name in names)

    def sizes(self, condition: str) -> tuple[float, ...]:
        """Sizes of a condition, in the order of the trials.

        Args:
            condition: One of `conditions`.

        Returns:
            The sizes.
        """
        return tuple(dict.fromkeys(trial.size for trial in self.trials if trial.condition == condition))

    def select(
        self, condition: str, size: float | None = None, task: str | None = None, matched: str | None = None
    ) -> tuple[Trial, ...]:
        """The trials of a condition, one for each draw and task.

        Args:
            condition: One of `conditions`.
            size: One of its sizes; may be left out where there is only one.
            task: One of `tasks`; None for all.
            matched: Only random heads that are matched to this condition, or to none; None for all.

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
            if (trial.condition, trial.size) == (condition, size)
            and task in (None, trial.task)
            and (matched is None or trial.matched in ("", matched))
        )
        if not found:
            raise UsageError(
                f"no trial of {condition!r} with {self.size_name} {size:g} on {task or 'any task'}; its sizes are "
                f"{_listed(sizes)}, the tasks {', '.join(map(repr, self.tasks))}."
            )
        return found

    def mean(
        self,
        condition: str,
        measure: str | None = None,
        *,
        size: float | None = None,
        task: str | None = None,
        matched: str | None = None,
    ) -> Estimate:
        """Mean of a measure under a condition and its 95 % interval.

        The bootstrap resamples prompts, and draws of random heads where there are several. Over several tasks, every
        task has the same weight and its prompts are resampled within it.

        Args:
            condition: One of `conditions`.
            measure: One of `measures`, by default the first.
            size: As in `select`.
            task: As in `select`.
            matched: As in `select`.

        Returns:
            Estimate: mean, low, high. For a measure with an interval that the trials hold, such as an angle, the
            interval of a single trial; over several draws their mean, least and largest.

        Raises:
            UsageError: If there is no such trial or measure.
        """
        measure = self._measure(measure)
        trials = self.select(condition, size, task, matched)
        rows = self._rows(trials, measure)
        if len(trials) == 1 and measure in trials[0].intervals:
            return Estimate(rows[0][0], *trials[0].intervals[measure])
        if any(measure in trial.intervals for trial in trials):
            draws = [row[0] for row in rows]
            return Estimate(sum(draws) / len(draws), min(draws), max(draws))
        bounds = SHARE if self._is_share(measure) else None
        if trials[0].task:
            return intervals.pooled_mean(by_task(trials, rows), seed=self.seed, bounds=bounds)
        return intervals.mean_over_draws(rows, seed=self.seed, bounds=bounds)

    def gain(
        self,
        condition: str,
        measure: str | None = None,
        *,
        over: str | None = None,
        size: float | None = None,
        task: str | None = None,
        n_comparisons: int = 1,
    ) -> Estimate:
        """Mean over prompts of a measure under one condition minus another, each prompt with itself, and its interval.

        Prompts are resampled, and draws of random heads together with them.

        Args:
            condition: One of `conditions`.
            measure: One of `measures`, by default the first.
            over: The condition to compare with, by default `control`, of the same size. The baseline has one size,
                which is compared with every size.
            size: As in `select`; of `over` where the condition is the baseline.
            task: As in `select`.
            n_comparisons: Number of comparisons whose intervals hold together with 95 %, by Bonferroni's correction.

        Returns:
            Estimate: mean, low, high of the difference.

        Raises:
            UsageError: If there is no such trial or measure, the measure is not a mean over prompts, or the two
                conditions were not measured on the same prompts.

        Limits:
            The interval is about prompts. `set_test` tells whether heads differ from random heads.
        """
        measure, over = self._measure(measure), over or self.control
        if condition == BASELINE in self.conditions:
            one, other = self.select(condition, self.sizes(condition)[0], task), self.select(over, size, task)
        else:
            one = self.select(condition, size, task)
            base = self.sizes(over)[0] if over == BASELINE and over in self.conditions else one[0].size
            other = self.select(over, base, task, matched=condition)
        rows, others = self._rows(one, measure), self._rows(other, measure)
        if any(measure in trial.intervals for trial in (*one, *other)):
            raise UsageError(f"{measure!r} is not a mean over prompts, so it has no paired gain; compare two means.")
        sides = by_task(one, rows), by_task(other, others)
        if [len(row) for row in sides[0]] != [len(row) for row in sides[1]]:
            raise UsageError(
                f"{condition!r} and {over!r} were not measured on the same prompts; compare conditions that share them."
            )
        bounds = SHARE_DIFFERENCE if self._is_share(measure) else None
        how: Any = {"seed": self.seed, "bounds": bounds, **intervals.together(n_comparisons)}
        if one[0].task:
            differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(*sides, strict=True)]
            return intervals.pooled_mean(differences, **how)
        return intervals.paired_difference(rows, others, **how)

    def set_test(
        self, condition: str, measure: str | None = None, *, size: float | None = None, over: str | None = None
    ) -> SetTest | None:
        """The test of a tested condition against random head sets, whose unit is the head set.

        Args:
            condition: One of `tested`.
            measure: One of `measures`, by default the first.
            size: As in `select`.
            over: The random condition, by default the one matched by layer, or "random kept", where there is one.

        Returns:
            SetTest: Or None where no random heads of this size were drawn for the condition, or there is no baseline.

        Raises:
            UsageError: If there is no such trial or measure.
        """
        return tested_set(self, condition, self._measure(measure), size, over)

    def _is_share(self, measure: str) -> bool:
        numbers = [value for trial in self.trials for value in trial.values.get(measure, ())]
        return measure in self.shares and min(numbers) >= 0 and max(numbers) <= 1

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
        control of its size, and the result of `set_test` where there are random head sets.

        Args:
            measure: One of `measures`, by default all of them.
            task: One of `tasks`; None for all tasks together.

        Returns:
            One dictionary for each row.
        """
        measures = self.measures if measure is None else (self._measure(measure),)
        return rows(self, measures, task)

    def findings(self, measure: str | None = None) -> tuple[tuple[str, float], ...]:
        """The tested conditions and sizes that differ from their control, corrected for the number of comparisons.

        Where there are random head sets, these are the ones that are beyond them, see `beyond_together`. Otherwise the
        interval of the gain over the control excludes 0 when it holds for all comparisons together.

        Args:
            measure: One of `measures`, by default the first.

        Returns:
            Pairs of condition and size; none for a share that is measured on fewer than 10 prompts.
        """
        return findings(self, self._measure(measure))

    def to_frame(self) -> Any:
        """The long table as a pandas DataFrame: condition, task, size, draw, heads, measure, prompt, value."""
        return frame(self)

    def summary(self, top: int = 10) -> str:
        """One line for each condition, size and measure: mean [95 % interval]; then the replies cut by a limit."""
        lines, found = [], self.rows()
        width = max(18, *(len(row["condition"]) for row in found))
        for row in found:
            numbers = self.show(row["measure"], row["mean"], row["low"], row["high"])
            size = f"{row['size']:.0%}" if self.size_name.startswith("share") else f"{row['size']:g}"
            name = f"{row['condition']:{width}s} {size:>4s}"
            line = f"{name}  {row['measure']:16s} {numbers}"
            if "gain" in row:
                gain = self.show(row["measure"], row["gain"], row["gain_low"], row["gain_high"], signed=True)
                line += f"  difference from {self.control}: {gain}"
            if "p_value" in row:
                beyond = f"beyond {row['n_beyond']} of {row['n_sets']} random sets"
                line += (
                    f"  {beyond}, {'p = ' + format(row['p_value'], '.2g') if row['decided'] else 'too few for a test'}"
                )
            lines.append(line)
        # the counts of each condition have a line of their own
        ended = sentence_of_trials(self.trials, self.settings).replace(". By condition:", ".\n  By condition:")
        counted = sentences_of_counted(self.settings, n_items(self.trials))
        return "\n".join([*counted, *lines, *([ended] if ended else [])])

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
        points = signed and measure in self.shares
        form = "+.0f" if points else ".0%" if measure in self.shares else "+.3f" if signed else ".3f"
        mean, low, high = (100 * number if points else number for number in (mean, low, high))
        interval = "" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]"
        return f"{mean:{form}}{' points' if points else ''}{interval}"

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
        return joined(parts)

    def __str__(self) -> str:
        return self.summary()


def _listed(sizes: Sequence[float]) -> str:
    return ", ".join(f"{size:g}" for size in sizes)
