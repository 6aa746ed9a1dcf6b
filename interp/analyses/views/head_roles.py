"""Heads sorted into the roles that were measured, with how certain each is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analyses import registry
from interp.analyses.results.codec import result
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.errors import ScoreError
from interp.hooks.model.heads import Head, HeadSet

MAX_FALSE_SHARE = 0.05
"""false discovery rate of the heads that have a role confidently"""


@result
@dataclass(frozen=True, eq=False)
class HeadRoles(Result):
    """The roles of every head, by score tables of one model."""

    names: tuple[str, ...]
    """roles, in the order in which a head with several of them is sorted under the first"""
    thresholds: tuple[float, ...]
    """score above which a head has the role"""
    scores: Float[Tensor, "f l h"]
    adjusted_p: Float[Tensor, "f l h"]
    """p-value of a score above the threshold, adjusted for all heads of the table, see `HeadScores.adjusted_p`"""

    @property
    def has(self) -> Bool[Tensor, "f l h"]:
        """Whether the score of a head is above the threshold."""
        return self.scores > self._thresholds

    @property
    def confident(self) -> Bool[Tensor, "f l h"]:
        """Whether a head is above the threshold, with a false discovery rate of at most 5 % in its table."""
        return self.has & (self.adjusted_p <= MAX_FALSE_SHARE)

    @property
    def main(self) -> Int[Tensor, "l h"]:
        """Number of the role under which a head is sorted: the first that is confident, else the first; -1 for none."""
        order = torch.arange(len(self.names), 0, -1)[:, None, None]
        # confident roles before all others
        rank = self.has * order + (self.has & self.confident) * len(self.names)
        best, which = rank.max(0)
        return torch.where(best > 0, which, -1)

    def heads(self, name: str) -> HeadSet:
        """All heads that have a role, whichever role they are sorted under.

        Args:
            name: One of `names`.
        """
        return HeadSet.from_mask(self.has[self.names.index(name)])

    def of(self, head: Head) -> list[str]:
        """The roles of one head.

        Args:
            head: A head of the model.
        """
        return [name for name, has in zip(self.names, self.has[:, head.layer, head.head], strict=True) if has]

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each head: layer, head, name, role, and the score for each role."""
        import pandas as pd

        main = self.main
        heads = [Head(*divmod(i, main.shape[1])) for i in range(main.numel())]
        roles = ["" if number < 0 else self.names[number] for number in main.flatten().tolist()]
        columns = {name: table.flatten().numpy() for name, table in zip(self.names, self.scores, strict=True)}
        return pd.DataFrame(
            {
                "layer": [head.layer for head in heads],
                "head": [head.head for head in heads],
                "name": [str(head) for head in heads],
                "role": roles,
                **columns,
            }
        )

    def summary(self, top: int = 10) -> str:
        """One line for each role: the number of its heads, and the first of them.

        Args:
            top: Number of heads to list.
        """
        lines = []
        for place, (name, threshold) in enumerate(zip(self.names, self.thresholds, strict=True)):
            has, confident = self.has[place], self.has[place] & self.confident[place]
            strongest = self.scores[place].masked_fill(~has, -torch.inf).flatten().argsort(descending=True, stable=True)
            heads = [str(Head(*divmod(int(i), has.shape[1]))) for i in strongest[: min(top, int(has.sum()))]]
            lines.append(
                f"{name:20s} above {threshold:g}: {int(confident.sum())} confident, {int(has.sum() - confident.sum())} "
                f"tentative  {', '.join(heads)}"
            )
        return "\n".join(lines)

    @property
    def _thresholds(self) -> Float[Tensor, "f 1 1"]:
        return torch.tensor(self.thresholds)[:, None, None]


def head_roles(scores: Mapping[str, HeadScores], thresholds: Mapping[str, float] | None = None) -> HeadRoles:
    """Sort heads into roles: a head has a role when its score is above the threshold of that table.

    `has[f l h] = scores[f l h] > threshold[f]`. A role is confident if a test of the head over prompts rejects that its
    true score is at most the threshold. The tests of all heads of a table are adjusted by Benjamini and Hochberg's
    method: of the heads called confident, on average at most 5 % have a true mean at or below the threshold. The test
    is exact for scores of 0 and 1, so a head with equal scores on all prompts is not certain. See
    `HeadScores.adjusted_p`.

    The threshold of a table is that of `thresholds`, else the table's own, else the one that its analysis declares.
    Tables without any of these are left out (gradients, patching: importance is no role). Roles keep the order of
    `scores`, except where an analysis declares a `role_order`: sinks come last, since a head may attend to the first
    token wherever it finds nothing else to do.

    Args:
        scores: Score tables of one model, by name.
        thresholds: Thresholds that take the place of the tables' own.

    Returns:
        HeadRoles: float32 `scores` and `adjusted_p [f l h]`, one row for each role.

    Raises:
        ScoreError: If no table has a threshold, or tables differ in shape.

    Examples:
        >>> from interp.analyses.views.head_roles import head_roles
        >>> head_roles({"induction": scores}, thresholds={"induction": 0.3}).names
        ('induction',)

    Source:
        Original. Retrieval's 0.1 is that of Wu et al. 2404.15574, the 0.3 of sinks that of Gu et al. 2410.10781. The
        other 0.3 are a convention.

    Limits:
        Does not show roles that were not measured, nor that the model uses a head for its role. With few prompts no
        head of a large table can be confident: of 270 heads, one needs at least 8 prompts at a threshold of 0.3.
    """
    known = {name: (thresholds or {}).get(name, threshold_of(name, table)) for name, table in scores.items()}
    names = [name for name, threshold in known.items() if threshold is not None]
    names.sort(key=_role_order)
    if not names:
        raise ScoreError(
            f"{', '.join(scores) or 'no scores'}: no table has a threshold; give thresholds={{name: number}}."
        )
    shapes = {tuple(scores[name].values.shape) for name in names}
    if len(shapes) > 1:
        raise ScoreError(f"the tables have the shapes {sorted(shapes)}; give the scores of one model.")
    return HeadRoles(
        tuple(names),
        tuple(float(known[name] or 0.0) for name in names),
        torch.stack([scores[name].values for name in names]),
        torch.stack([scores[name].adjusted_p(known[name]).float() for name in names]),
    )


def threshold_of(name: str, table: HeadScores) -> float | None:
    """The score above which a head has the role of a table; None where the table measures no role.

    It is the table's threshold, else the one that its analysis declares. A threshold of 0 only states that a head
    differs from nothing, which is no role.

    Args:
        name: Name of the analysis.
        table: Its scores.
    """
    threshold = table.threshold
    if threshold is None:
        entry = registry.find(name)
        threshold = None if entry is None else entry.threshold
    return threshold if threshold is not None and threshold > 0 else None


def _role_order(name: str) -> float:
    entry = registry.find(name)
    return 0.0 if entry is None else entry.role_order
