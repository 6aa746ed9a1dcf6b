"""Loss and accuracy of known answers by selector, share and task."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from interp.errors import UsageError

CONTROL, WHOLE = "random", "whole"
"""names of the control, and of the model with every key"""


@dataclass(frozen=True)
class KeyPoint:
    """One selector at one share on one task."""

    selector: str
    share: float
    task: str
    kept: float
    """of the context's keys, over layers and kv heads"""
    loss: tuple[float, ...] = field(repr=False)
    """of each prompt, nats per token of the answer"""
    right: tuple[float, ...] = field(repr=False)
    """share of the answer's tokens that are the most likely ones"""


@dataclass(frozen=True)
class KeyCurve:
    """All points; "whole" is the model with every key."""

    points: tuple[KeyPoint, ...]
    seed: int = 0

    @property
    def selectors(self) -> tuple[str, ...]:
        """Names, the model with every key left out."""
        return tuple(dict.fromkeys(point.selector for point in self.points if point.selector != WHOLE))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.task for point in self.points))

    @property
    def shares(self) -> tuple[float, ...]:
        """From small to large, that of the model with every key left out."""
        return tuple(sorted({point.share for point in self.points if point.selector != WHOLE}))

    def at(
        self, selector: str, share: float, task: str | None = None, measure: str = "right"
    ) -> tuple[float, float, float]:
        """Mean and 95% interval over prompts; without a task over all tasks, each weighing the same."""
        return pooled(self._rows(selector, share, task, measure), seed=self.seed)

    def gain(
        self, selector: str, share: float, task: str | None = None, measure: str = "right"
    ) -> tuple[float, float, float]:
        """The measure less that of random keys of the same share, prompt by prompt, and its 95% interval."""
        one, other = (self._rows(name, share, task, measure) for name in (selector, CONTROL))
        apart = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(one, other, strict=True)]
        return pooled(apart, seed=self.seed)

    def _rows(self, selector: str, share: float, task: str | None, measure: str) -> list[tuple[float, ...]]:
        """Numbers of the prompts of each task."""
        if measure not in ("right", "loss"):
            raise UsageError(f'measure {measure!r} is none: give "right" or "loss".')
        wanted = self.tasks if task is None else (task,)
        found = {p.task: getattr(p, measure) for p in self.points if (p.selector, p.share) == (selector, share)}
        if missing := [name for name in wanted if name not in found]:
            raise UsageError(f"no point of {selector!r} at {share} on {missing[0]!r}.")
        return [found[name] for name in wanted]

    def rows(self, task: str | None = None, measure: str = "right") -> list[dict[str, Any]]:
        """A row for each selector and share: the measure, and what it gains over random keys, with their intervals.

        Without a task over all tasks; no gain for random keys and the model with every key.
        """
        found = []
        for name in (WHOLE, *self.selectors):
            for share in (1.0,) if name == WHOLE else self.shares:
                row = {"selector": name, "share": share}
                row |= dict(zip(("mean", "low", "high"), self.at(name, share, task, measure), strict=True))
                if name not in (WHOLE, CONTROL):
                    gain = self.gain(name, share, task, measure)
                    row |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
                found.append(row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"seed": self.seed, "points": [vars(point) for point in self.points]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "KeyCurve":
        """The inverse of to_dict."""
        points = [
            KeyPoint(**{**point, "loss": tuple(point["loss"]), "right": tuple(point["right"])})
            for point in content["points"]
        ]
        return cls(tuple(points), content["seed"])

    @classmethod
    def join(cls, parts: Iterable["KeyCurve"]) -> "KeyCurve":
        """Curves of several tasks as one. Raises UsageError for none."""
        found = list(parts)
        if not found:
            raise UsageError("no curves were given to be joined: give one at least.")
        return cls(tuple(point for part in found for point in part.points), found[0].seed)

    def __str__(self) -> str:
        lines = []
        for row in self.rows():
            mean, low, high = row["mean"], row["low"], row["high"]
            told = f"{row['selector']:16s} {row['share']:4.0%} kept  {mean:4.0%} right  [{low:.0%}, {high:.0%}]"
            if "gain" in row:
                gain, low, high = (round(100 * row[key]) for key in ("gain", "gain_low", "gain_high"))
                told += f"  {gain:+d} points over random keys  [{low:+d}, {high:+d}]"
            lines.append(told)
        return "\n".join(lines)


def pooled(
    rows: Sequence[Sequence[float]], level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of the rows' means and its percentile interval, each row (a task's prompts) resampled within itself."""
    values = [torch.tensor(row, dtype=torch.float64) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    means = [row[torch.randint(len(row), (draws, len(row)), generator=generator)].mean(1) for row in values]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.stack(means).mean(0), ends).tolist()
    return float(torch.stack([row.mean() for row in values]).mean()), low, high
