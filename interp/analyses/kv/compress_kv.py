"""CompressKV: a few semantic retrieval heads of a layer choose the keys that all of its heads keep."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.analyses.kv.shares import spread_over
from interp.analyses.kv.snapkv import SnapKV, observed, smoothed
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext
from interp.hooks.model.heads import HeadLayout, HeadSet


@dataclass(frozen=True)
class CompressKV(SnapKV):
    """The keys that the layer's best semantic retrieval heads attend to from the last tokens; one choice for a layer.

    rank[b g k] = mean over k' within pool of k, over the layer's `voters` h, and the last `window` rows q of
    pattern[b h q k']. voters: query heads, `CompressKV.of` takes the first four of each layer of a score table. layers:
    a weight for each layer's budget, as `layer_errors` measures them; the model's share stays what was asked.
    Source: 2508.02401. Differs: layers without a voter take all of their heads. Cannot show: that voters are semantic;
    give scores of identify.semantic for that.
    """

    window: int = 8
    recent: int = 8
    pool: int = 5
    voters: str = ""
    layers: tuple[float, ...] = ()

    @classmethod
    def of(cls, scores: HeadScores, share: float, each: int = 4, **settings: object) -> "CompressKV":
        """Voters: the `each` highest heads of every layer, of those with a score above 0."""
        values = scores.values.nan_to_num(0.0)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :each].tolist()
        named = [(layer, head) for layer, row in enumerate(order) for head in row if values[layer, head] > 0]
        voters = HeadSet.parse(named) if named else HeadSet()
        return cls(share=share, voters=str(voters), **settings)  # pyright: ignore[reportArgumentType]

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        _, heads, groups, _, _ = here.call.sizes
        named = HeadSet.parse(self.voters).by_layer().get(here.site.layer, ()) if self.voters else ()
        received = here.columns(observed(here, self.window)).float()
        received = received[:, list(named) or list(range(heads))].mean(1, keepdim=True)
        return smoothed(received, self.pool, here).expand(-1, groups, -1)

    def budgets(self, layout: HeadLayout, choose: Bool[Tensor, "l"]) -> Float[Tensor, "l g"]:
        if not self.layers:
            return super().budgets(layout, choose)
        if len(self.layers) != layout.layers or self.full:
            given = f"{len(self.layers)} layer weights for {layout.layers} layers, full={self.full!r}"
            raise UsageError(f"{given}: give one weight each, and no full heads.")
        weights = torch.tensor(self.layers)[:, None].expand(-1, layout.kv_heads)
        return spread_over(weights, choose, self.share)
