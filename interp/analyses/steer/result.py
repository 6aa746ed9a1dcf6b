"""The result of a steering run: the choice of heads and settings, and the test of the chosen edit."""

from dataclasses import dataclass, field
from typing import Any

from interp.analyses.results.codec import result
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.analyses.results.trial import BASELINE
from interp.analyses.results.trials import Trials
from interp.analyses.steer.choose import SettingComparison
from interp.analyses.steer.describe import describe
from interp.analyses.steer.load_edits import edits_from_dicts
from interp.errors import UsageError
from interp.hooks.edit.edit import Edits
from interp.hooks.model.provenance import Provenance


@result
@dataclass(frozen=True)
class SettingComparisons(Result):
    """The settings that `choose` compared, best first.

    Args:
        comparisons: One entry for each setting, with the unmodified model among them as "baseline".
    """

    comparisons: tuple[SettingComparison, ...]

    @property
    def best(self) -> str:
        """Name of the best setting, the unmodified model aside."""
        return next(each.name for each in self.comparisons if each.name != BASELINE)

    def __getitem__(self, name: str) -> SettingComparison:
        found = {each.name: each for each in self.comparisons}
        if name not in found:
            raise UsageError(f"unknown setting {name!r}; choose from {', '.join(map(repr, found))}.")
        return found[name]

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row per setting: name, score, low, high, common, accuracy."""
        import pandas as pd

        names = ("name", "score", "low", "high", "common", "accuracy")
        return pd.DataFrame([{name: getattr(each, name) for name in names} for each in self.comparisons])

    def summary(self, top: int = 10) -> str:
        """One line for each setting: score [95 % interval], and the share of right replies.

        Args:
            top: Number of settings to list.
        """
        return "\n".join(map(str, self.comparisons[:top]))


@result
@dataclass(frozen=True, eq=False)
class SteeringResult(Result):
    """An edit, how its heads and settings were chosen, and its effect on a task.

    Args:
        method: Name of the edit in the registry, such as "pasta".
        edit: The tested edit, as `Edit.to_dict` gives each part.
        task: Name of the task.
        chosen: Name of the chosen setting among `tried`, or "named" where the heads were given.
        trials: The test, see `steer_check`.
        tried: Settings that were compared on the dev split, best first.
        profile: Gain of each head alone, where heads were profiled.
    """

    method: str
    edit: tuple[dict[str, Any], ...] = field(repr=False)
    task: str
    chosen: str
    trials: Trials
    tried: tuple[SettingComparison, ...] = ()
    profile: HeadScores | None = None

    @property
    def edits(self) -> Edits:
        """The tested edit."""
        return edits_from_dicts(self.edit)

    @property
    def provenance(self) -> Provenance | None:
        """Model and versions of the test."""
        return self.trials.provenance

    def to_frame(self) -> Any:
        """The long table of the test as a pandas DataFrame, see `Trials.to_frame`."""
        return self.trials.to_frame()

    def summary(self, top: int = 10) -> str:
        """The edit, the settings that were compared, and the test as text.

        Args:
            top: Number of settings to list.
        """
        lines = [f"{describe(self.edits)} on {self.task}, {self.chosen}", *map(str, self.tried[:top])]
        return "\n".join([*lines, self.trials.summary(top)])
