"""CompressKV: a few semantic retrieval heads of a layer choose the keys that all of its heads keep."""

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
from interp.hooks.edit.edit import EditContext
from interp.hooks.model.heads import HeadLayout, HeadSet


@selector(name="compress_kv", title="CompressKV", order=4, needs=("semantic_retrieval",))
@dataclass(frozen=True)
class CompressKV(SnapKV):
    """Keep the keys to which the best semantic retrieval heads attend from the last tokens: one choice for each layer.

    The last `window` keys are always kept. Of the keys before them, `rank[b g k]` is the mean of `pattern[b h q k']`
    over the `voters` h of the layer, the last `window` rows q of the prompt, and the `kernel_size` keys k' centred on
    k. It is the same for all kv heads g of the layer.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: Number of first keys, which are part of `keep_ratio` and kept before all other keys.
        n_recent: Number of last keys, which are part of `keep_ratio` and kept before the ranked keys; at least `window`
            are kept.
        full_cache_heads: Heads whose kv heads keep everything; none where `layer_weights` are given.
        window: Number of last rows of the prompt whose attention ranks the keys.
        kernel_size: Width, in keys, of the pooling window centred on each key, itself included; an odd number.
        pooling: "mean" of the neighbours, or their "max".
        voters: Query heads that rank the keys; a layer without a voter uses all of its heads.
        layer_weights: A weight for the budget of each layer, as `layer_errors` measures them. The model still keeps
            `keep_ratio` of the keys.

    Raises:
        UsageError: If a setting is out of range, or the weights do not fit the model.

    Examples:
        >>> from interp.analyses.kv import CompressKV
        >>> CompressKV.from_scores(scores, 0.5, n_voters=2).voters.count("L")
        4

    Source:
        2508.02401.

    Differs:
        A layer without a voter uses all of its heads.

    Limits:
        Does not show that the voters are semantic; use scores of `identify.semantic_retrieval` for that.
    """

    window: int = 8
    n_recent: int = 8
    kernel_size: int = 5
    voters: str = ""
    layer_weights: tuple[float, ...] = ()

    @classmethod
    def from_scores(cls, scores: HeadScores, keep_ratio: float, *, n_voters: int = 4, **settings: Any) -> "CompressKV":
        """Voters by a score table: the highest heads of every layer, of those with a score above 0.

        Args:
            scores: Scores, such as those of `identify.semantic_retrieval`.
            keep_ratio: Share of the prompt's keys that the model keeps.
            n_voters: Number of voters of each layer.
            settings: Further fields.

        Returns:
            CompressKV: the selector.
        """
        values = scores.values.nan_to_num(0.0)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :n_voters].tolist()
        named = [(layer, head) for layer, row in enumerate(order) for head in row if values[layer, head] > 0]
        voters = HeadSet.parse(named) if named else HeadSet()
        return cls(**{"keep_ratio": keep_ratio, "voters": str(voters), **settings})

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        """Pooled attention of the voters from the last rows."""
        _, heads, groups, _, _ = here.call.sizes
        named = HeadSet.parse(self.voters).by_layer().get(here.site.layer, ()) if self.voters else ()
        received = self.observed(here)[:, list(named) or list(range(heads))].mean(1, keepdim=True)
        return self.pooled(here, received).expand(-1, groups, -1)

    def budgets(self, layout: HeadLayout, choose: Bool[Tensor, "l"]) -> Float[Tensor, "l g"]:
        if not self.layer_weights:
            return super().budgets(layout, choose)
        if len(self.layer_weights) != layout.layers or self.full_cache_heads:
            raise UsageError(
                f"{len(self.layer_weights)} layer weights for {layout.layers} layers, with "
                f"full_cache_heads={self.full_cache_heads!r}; give one weight for each layer, and no full_cache_heads."
            )
        weights = torch.tensor(self.layer_weights)[:, None].expand(-1, layout.kv_heads)
        return spread_over(weights, choose, self.keep_ratio)
