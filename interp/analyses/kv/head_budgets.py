"""HeadKV and Task-KV: heads keep as much as they are worth."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.analyses.identify.task_kv import distances
from interp.analyses.kv.shares import falling, full_heads, spread_over, unwindowed
from interp.analyses.kv.snapkv import SnapKV, observed
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext
from interp.hooks.model.heads import HeadLayout


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
        best = scores.by_group().clamp(min=0)
        part = best.double() / best.double().sum().clamp(min=1e-300)
        rows = tuple(tuple(round(value, 9) for value in row) for row in part.tolist())
        return cls(share=share, importance=rows, **settings)  # pyright: ignore[reportArgumentType]

    def budgets(self, layout: HeadLayout, choose: Bool[Tensor, "l"]) -> Float[Tensor, "l g"]:
        scores = torch.tensor(self.importance)
        if scores.shape != (layout.layers, layout.kv_heads) or self.full or self.beta < 1:
            raise UsageError(
                f"importance is {tuple(scores.shape)}, beta={self.beta}: give [layers][kv heads] "
                f"({layout.layers} x {layout.kv_heads}), a beta of at least 1, and no full."
            )
        part = scores / scores[choose].mean().clamp(min=1e-12)
        return spread_over((1 - 1 / self.beta) + part / self.beta, choose, self.share)


@dataclass(frozen=True)
class TaskKV(SnapKV):
    """Heads whose summary of the prompt is far from their layer's centre keep everything; the others the first, the
    last, and some keys between that the last tokens attend to, by SnapKV's rank.

    A kv head is as far as the farthest of its query heads, by `identify.task_kv`'s distance on this prompt. The full
    ones are `part` of the budget: int(part share L G) in all, more in the first layers than in the last, falling
    linearly as in the paper; of two or more in a layer the last is the nearest to the centre instead.
    Source: 2501.15113. Differs: the budget is the model's, not each layer's, and kv heads are chosen, of which the
    paper does not speak; `TaskKV.of(identify.task_kv(...), share)` chooses them once for a task, over all layers.
    Cannot show: what W_O makes of the distance.
    """

    window: int = 32
    part: float = 0.4
    top: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.part < 1 or self.top < 1:
            raise UsageError(f"part={self.part}, top={self.top}: give a part of the budget in [0, 1), and a key.")

    @classmethod
    def of(cls, scores: HeadScores, share: float, part: float = 0.4, **settings: object) -> "TaskKV":
        """Full heads: the farthest by `scores`, whatever the prompt."""
        return cls(share=share, part=part, full=str(full_heads(scores, share, part)), **settings)  # pyright: ignore

    def spread(self, here: EditContext) -> Float[Tensor, "b g"]:
        if self.full:
            return super().spread(here)
        layout, layer = self.layout(here), here.site.layer
        choose = unwindowed(here.site.module, layout.layers)
        layers, groups = int(choose.sum()), layout.kv_heads
        counts = falling(int(self.part * self.share * layers * groups), layers, groups)
        fixed = sum(counts) / (layers * groups)
        received = here.columns(observed(here, self.window), all_rows=True)
        far = distances(received, here.call.v, self.top).unflatten(1, (groups, -1)).amax(-1)
        order = far.argsort(dim=1, descending=True, stable=True)
        count = counts[int(choose[:layer].sum())]
        chosen = order[:, :count] if count < 2 else torch.cat([order[:, : count - 1], order[:, -1:]], 1)
        shares = torch.full_like(far, (self.share - fixed) / (1 - fixed))
        return shares.scatter(1, chosen, 1.0)
