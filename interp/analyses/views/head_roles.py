"""Heads sorted into the functions that were measured, with how sure."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError
from interp.hooks.model.heads import Head, HeadSet

CUTS = {"induction": 0.3, "previous_token": 0.3, "duplicate_token": 0.3}
"""share of attention above which a head counts, for tables that state no threshold of their own"""


@dataclass(frozen=True, eq=False)
class HeadRoles:
    """Which heads do what, by tables of one model."""

    names: tuple[str, ...]
    """f, in the order in which a head with several functions is put under the first"""
    cuts: tuple[float, ...]
    scores: Float[Tensor, "f l h"]
    low: Float[Tensor, "f l h"]
    """lower end of the 95% interval, NaN where there is none"""

    @property
    def has(self) -> Bool[Tensor, "f l h"]:
        """The score is above the cut."""
        return self.scores > self._cut

    @property
    def sure(self) -> Bool[Tensor, "f l h"]:
        """The whole interval is."""
        return self.low > self._cut

    @property
    def main(self) -> Int[Tensor, "l h"]:
        """Number of the function that a head is put under: the first that is sure, else the first; -1 for none."""
        order = torch.arange(len(self.names), 0, -1)[:, None, None]
        # sure ones before all others
        rank = self.has * order + (self.has & self.sure) * len(self.names)
        best, which = rank.max(0)
        return torch.where(best > 0, which, -1)

    def heads(self, name: str) -> HeadSet:
        """All heads that have a function, whichever they are put under."""
        place = self.names.index(name)
        return HeadSet.from_mask(self.has[place])

    def of(self, head: Head) -> list[str]:
        """The functions of one head."""
        return [name for name, has in zip(self.names, self.has[:, head.layer, head.head], strict=True) if has]

    @property
    def _cut(self) -> Float[Tensor, "f 1 1"]:
        return torch.tensor(self.cuts)[:, None, None]


def head_roles(scores: Mapping[str, HeadScores], cuts: Mapping[str, float] | None = None) -> HeadRoles:
    """Sort heads into functions: a head has a function when its score is above that table's cut.

    has[f l h] = scores[f l h] > cut[f]; sure where the 95% interval over prompts lies above it. cut: `cuts`, else the
    table's threshold, else 0.3 for the shares of attention in CUTS; tables without any are left out (gradients,
    patching: how much a head matters is no function). Order: that of `scores`, sinks last, since a head may rest on the
    first token wherever it finds nothing to do.
    Raises ScoreError where no table has a cut, or tables differ in shape.
    Source: ours. Retrieval 0.1 is Wu et al. 2404.15574's, sinks 0.3 Gu et al. 2410.10781's; 0.3 for the others is a
    convention. Cannot show: functions that were not measured, nor that a head is used for what it does here; of many
    heads near a cut some are above it by chance.
    """
    known = {name: (cuts or {}).get(name, cut_of(name, table)) for name, table in scores.items()}
    names = [name for name, cut in known.items() if cut is not None]
    names.sort(key=lambda name: name == "sinks")
    if not names:
        raise ScoreError(
            f"{', '.join(scores) or 'no scores'}: no table has a threshold, so give cuts={{name: number}}."
        )
    shapes = {tuple(scores[name].values.shape) for name in names}
    if len(shapes) > 1:
        raise ScoreError(f"the tables have shapes {sorted(shapes)}: give the scores of one model.")
    return HeadRoles(
        tuple(names),
        tuple(float(known[name] or 0.0) for name in names),
        torch.stack([scores[name].values for name in names]),
        torch.stack([scores[name].low for name in names]),
    )


def cut_of(name: str, table: HeadScores) -> float | None:
    """The score above which a head counts in this table: its threshold, else that of CUTS, else none.

    A threshold of 0 says that a head differs from nothing, which is no function.
    """
    cut = CUTS.get(name) if table.threshold is None else table.threshold
    return cut if cut is not None and cut > 0 else None
