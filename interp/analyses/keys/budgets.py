"""HeadKV and Task-KV: heads keep as much as they are worth."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.analyses.keys.base import full_heads, relative
from interp.analyses.keys.window import SnapKV
from interp.analyses.scores import HeadScores
from interp.hooks.heads import HeadLayout
from interp.kernels.errors import UsageError


@dataclass(frozen=True)
class HeadKV(SnapKV):
    """SnapKV whose kv heads have budgets by importance: a part is shared out evenly, the rest by the scores of heads.

    budget[l g] = share ((1 - 1/beta) + importance[l g] L G / beta), importance the best score of the group's heads as
    a share of all; none above 1, what does not fit goes to the others.
    Source: HeadKV-R2 (ICLR 2025). Differs: the best head of a kv head counts, where the paper has no groups.
    Cannot show: that scores measured on one task tell what another needs.
    """

    importance: tuple[tuple[float, ...], ...] = ()
    """[l][g]"""
    beta: float = 1.2

    @classmethod
    def of(cls, scores: HeadScores, share: float, **settings: object) -> "HeadKV":
        """Importance from a score table; heads without a score, or below 0, count as 0."""
        best = scores.values.nan_to_num(0.0).clamp(min=0).unflatten(1, (scores.layout.kv_heads, -1)).amax(-1)
        rows = tuple(tuple(round(value, 6) for value in row) for row in best.tolist())
        return cls(share=share, importance=rows, **settings)  # pyright: ignore[reportArgumentType]

    def budget(self, layer: int, group: Tensor, layout: HeadLayout) -> Float[Tensor, "g"]:
        scores = torch.tensor(self.importance)
        if scores.shape != (layout.layers, layout.kv_heads) or self.full or self.beta < 1:
            raise UsageError(
                f"importance is {tuple(scores.shape)}, beta={self.beta}: give [layers][kv heads] "
                f"({layout.layers} x {layout.kv_heads}), a beta of at least 1, and no full."
            )
        part = scores / scores.sum().clamp(min=1e-12) * scores.numel()
        return relative((1 - 1 / self.beta) + part / self.beta, self.share)[layer]


@dataclass(frozen=True)
class TaskKV(SnapKV):
    """Heads whose summary of the prompt is far from their layer's centre keep everything; the others the first, the
    last, and some keys between that the last tokens attend to.

    `TaskKV.of(identify.task_kv(...), share)` gives the farthest kv heads `part` of the budget, whole, and the rest to
    the others, by SnapKV's rank. Source: 2501.15113. Differs: heads are chosen once for a task, from prompts of it, and
    over all layers, where the paper chooses for each prompt with a number that falls from layer to layer.
    Cannot show: what W_O makes of the distance.
    """

    window: int = 32

    @classmethod
    def of(cls, scores: HeadScores, share: float, part: float = 0.4, **settings: object) -> "TaskKV":
        """Full heads: the farthest by `scores`."""
        return cls(share=share, full=str(full_heads(scores, share, part)), **settings)  # pyright: ignore
