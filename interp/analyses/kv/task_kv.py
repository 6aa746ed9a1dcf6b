"""Task-KV: heads far from the centre of their layer keep everything."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.analyses.identify.task_kv import distances
from interp.analyses.kv._observation import observed_rows
from interp.analyses.kv._shares import falling, global_layers
from interp.analyses.kv.full_cache_heads import full_cache_heads
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.registry import selector
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext


@selector(name="task_kv", title="Task-KV", order=3)
@dataclass(frozen=True)
class TaskKV(SnapKV):
    """Heads whose summary of the prompt is far from their layer's centre keep everything, the others some keys.

    The others keep the first keys, the last, and some keys between, by SnapKV's rank. The distance of a kv head is that
    of the farthest of its query heads, by `identify.task_kv` on this prompt. Heads with a full cache use `part` of the
    budget: `int(part keep_ratio L G)` in all, more in the first layers than in the last, falling linearly as in the
    paper. Of two or more in a layer, the last is the head nearest to the centre instead.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: Number of first keys, which are part of `keep_ratio` and kept before all other keys.
        n_recent: Number of last keys, which are part of `keep_ratio` and kept before the ranked keys; at least `window`
            are kept.
        full_cache_heads: Heads that keep everything whatever the prompt, in place of those by distance.
        window: Number of last rows of the prompt whose attention ranks the keys.
        kernel_size: Width, in keys, of the pooling window centred on each key, itself included; an odd number.
        pooling: "mean" of the neighbours, or their "max".
        part: Part of the budget for heads with a full cache, in [0, 1).
        top: Keys whose values are averaged for the summary of a head.

    Raises:
        UsageError: If a setting is out of range.

    Source:
        2501.15113.

    Differs:
        The paper keeps 16 first and 256 last keys; set `n_sink` and `n_recent` for that. The budget belongs to the
        model, not to each layer. kv heads are chosen, which the paper does not discuss.
        `TaskKV.from_scores(identify.task_kv(...), keep_ratio)` chooses them once for a task, over all layers.

    Limits:
        Does not show the effect of the output projection on the distance.
    """

    n_sink: int = 4
    kernel_size: int = 7
    part: float = 0.4
    top: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.part < 1 or self.top < 1:
            raise UsageError(
                f"part={self.part}, top={self.top}; give a part of the budget in [0, 1), and at least 1 key."
            )

    @classmethod
    def from_scores(cls, scores: HeadScores, keep_ratio: float, *, part: float = 0.4, **settings: Any) -> "TaskKV":
        """Heads with a full cache by a score table: the farthest ones, whatever the prompt.

        Args:
            scores: Scores of `identify.task_kv`.
            keep_ratio: Share of the prompt's keys that the model keeps.
            part: Part of the budget for heads with a full cache.
            settings: Further fields.

        Returns:
            TaskKV: the selector.
        """
        heads = str(full_cache_heads(scores, keep_ratio, part))
        return cls(**{"keep_ratio": keep_ratio, "part": part, "full_cache_heads": heads, **settings})

    def spread(self, here: EditContext) -> Float[Tensor, "b g"]:
        if self.full_cache_heads:
            return super().spread(here)
        layout, layer = self.layout(here), here.site.layer
        choose = global_layers(here.site.module, layout.layers)
        layers, groups = int(choose.sum()), layout.kv_heads
        counts = falling(int(self.part * self.keep_ratio * layers * groups), layers, groups)
        fixed = sum(counts) / (layers * groups)
        received = here.columns(observed_rows(here, self.window), all_rows=True)
        far = distances(received, here.call.v, self.top).unflatten(1, (groups, -1)).amax(-1)
        order = far.argsort(dim=1, descending=True, stable=True)
        count = counts[int(choose[:layer].sum())]
        chosen = order[:, :count] if count < 2 else torch.cat([order[:, : count - 1], order[:, -1:]], 1)
        shares = torch.full_like(far, (self.keep_ratio - fixed) / (1 - fixed))
        return shares.scatter(1, chosen, 1.0)
