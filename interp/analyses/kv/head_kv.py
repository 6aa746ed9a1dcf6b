"""HeadKV: kv heads get budgets by the scores of their heads."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analyses.kv._observation import Pooling
from interp.analyses.kv._shares import global_layers, spread_over
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.registry import selector
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext
from interp.hooks.model.heads import HeadLayout


@selector(name="head_kv", title="HeadKV", order=5, needs=(("retrieval_reasoning",), ("retrieval",)))
@dataclass(frozen=True)
class HeadKV(SnapKV):
    """SnapKV whose kv heads have budgets by importance: a part is divided evenly, the rest by the scores of heads.

    Every kv head keeps the f first and last keys that SnapKV keeps before all others. The other keys of the budget are
    `C = keep_ratio n - f` for each of the G kv heads of L layers, which keep
    `f + C (1 - 1/beta) + importance[l g] L G C / beta` keys, where the importance is the best score of the group's
    heads as a share of all. No head keeps more than the prompt; the excess goes to the others.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: Number of first keys, which are part of `keep_ratio` and kept before all other keys.
        n_recent: Number of last keys, which are part of `keep_ratio` and kept before the ranked keys; at least `window`
            are kept.
        full_cache_heads: Must be empty, since budgets come from the importance.
        window: Number of last rows of the prompt whose attention ranks the keys.
        kernel_size: Width, in keys, of the pooling window centred on each key, itself included; an odd number.
        pooling: "mean" of the neighbours, or their "max".
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
        The best head of a kv head counts, where the released code keeps keys for each query head. The budget is a share
        of the prompt, where the released code keeps a fixed number of keys.

    Limits:
        Does not show that scores measured on one task fit another.
    """

    kernel_size: int = 7
    pooling: Pooling = "max"
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

    def counts(self, here: EditContext, length: Int[Tensor, "b"]) -> Int[Tensor, "b g"]:
        layout, layer = self.layout(here), here.site.layer
        choose = global_layers(here.site.module, layout.layers)
        weights = self.weights(layout, choose)
        rows = []
        for n in length.tolist():
            total = self.keep_ratio * n
            forced = min(sum(self.forced), total)
            shares = spread_over(weights, choose, (total - forced) / (n - forced))[layer]
            rows.append((forced + shares * (n - forced)).round())
        return torch.stack(rows).to(length.device).long()

    def weights(self, layout: HeadLayout, choose: Bool[Tensor, "l"]) -> Float[Tensor, "l g"]:
        """Number of keys of each kv head, in addition to the forced ones, in relation to the mean of all heads.

        Args:
            layout: Layers and heads of the model.
            choose: Layers in which keys are dropped.

        Returns:
            The weights `[l g]`, whose mean over `choose` is 1.

        Raises:
            UsageError: If the importance does not fit the model, or a setting is out of range.
        """
        scores = torch.tensor(self.importance)
        if scores.shape != (layout.layers, layout.kv_heads) or self.full_cache_heads or self.beta < 1:
            raise UsageError(
                f"importance of shape {list(scores.shape)}, beta={self.beta}; give [layers][kv heads] "
                f"({layout.layers} x {layout.kv_heads}), a beta of at least 1, and no full_cache_heads."
            )
        return (1 - 1 / self.beta) + scores / scores[choose].mean().clamp(min=1e-12) / self.beta
