"""HeadKV: kv heads get budgets by the scores of their heads."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.analyses.kv._shares import spread_over
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.registry import selector
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout


@selector(name="head_kv", title="HeadKV", order=5, needs=(("retrieval_reasoning",), ("retrieval",)))
@dataclass(frozen=True)
class HeadKV(SnapKV):
    """SnapKV whose kv heads have budgets by importance: a part is divided evenly, the rest by the scores of heads.

    `budget[l g] = keep_ratio ((1 - 1/beta) + importance[l g] L G / beta)` for L layers of G kv heads, where the
    importance is the best score of the group's heads as a share of all. No budget is above 1; the excess goes to the
    others.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: Number of first keys, which are part of `keep_ratio` and kept before all other keys.
        n_recent: Number of last keys, which are part of `keep_ratio` and kept before the ranked keys.
        full_cache_heads: Must be empty, since budgets come from the importance.
        window: Number of last rows of the prompt whose attention ranks the keys.
        kernel_size: Width, in keys, of the averaging window centred on each key, itself included; an odd number.
        importance: Importance `[l][g]` of each kv head.
        beta: Divisor of the part by importance, at least 1.

    Raises:
        UsageError: While the model runs, if the importance does not fit the model, or a setting is out of range.

    Examples:
        >>> from interp.analyses.kv import HeadKV
        >>> selector = HeadKV.from_scores(scores, 0.5)
        >>> len(selector.importance), len(selector.importance[0])
        (2, 2)

    Source:
        HeadKV-R2 (ICLR 2025) with scores of `identify.retrieval_reasoning`, HeadKV-R with those of
        `identify.retrieval`.

    Differs:
        The best head of a kv head counts, where the paper has no groups.

    Limits:
        Does not show that scores measured on one task fit another.
    """

    importance: tuple[tuple[float, ...], ...] = ()
    beta: float = 1.2

    @classmethod
    def from_scores(cls, scores: HeadScores, keep_ratio: float, **settings: Any) -> "HeadKV":
        """Importance by a score table; heads without a score, or below 0, count as 0.

        Args:
            scores: Scores, such as those of `identify.retrieval_reasoning`.
            keep_ratio: Share of the prompt's keys that the model keeps.
            settings: Further fields.

        Returns:
            HeadKV: the selector.
        """
        best = scores.by_group().clamp(min=0)
        part = best.double() / best.double().sum().clamp(min=1e-300)
        rows = tuple(tuple(round(value, 9) for value in row) for row in part.tolist())
        return cls(**{"keep_ratio": keep_ratio, "importance": rows, **settings})

    def budgets(self, layout: HeadLayout, choose: Bool[Tensor, "l"]) -> Float[Tensor, "l g"]:
        scores = torch.tensor(self.importance)
        if scores.shape != (layout.layers, layout.kv_heads) or self.full_cache_heads or self.beta < 1:
            raise UsageError(
                f"importance of shape {list(scores.shape)}, beta={self.beta}; give [layers][kv heads] "
                f"({layout.layers} x {layout.kv_heads}), a beta of at least 1, and no full_cache_heads."
            )
        part = scores / scores[choose].mean().clamp(min=1e-12)
        return spread_over((1 - 1 / self.beta) + part / self.beta, choose, self.keep_ratio)
