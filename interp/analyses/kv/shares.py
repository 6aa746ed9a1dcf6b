"""How a share of the keys is split over heads."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.model.heads import HeadSet


def unwindowed(module: nn.Module, layers: int) -> Bool[Tensor, "l"]:
    """The layers of an attention module's model that see every key: those whose cache does not drop any by itself."""
    from transformers import DynamicCache

    config: Any = module.config
    slides = [bool(getattr(layer, "is_sliding", False)) for layer in DynamicCache(config=config).layers]
    return ~torch.tensor(slides or [False] * layers)


def rest(share: float, whole: Bool[Tensor, "l g"]) -> float:
    """The share of the kv heads that do not keep everything, so that all together keep `share`."""
    fixed = float(whole.float().mean())
    if fixed >= share:
        raise UsageError(
            f"share={share} of the keys is kept, but {int(whole.sum())} of {whole.numel()} kv heads keep everything, "
            f"which is {fixed:.2f}: give a larger share, or fewer full heads."
        )
    return (share - fixed) / (1 - fixed)


def full_heads(scores: HeadScores, share: float, part: float) -> HeadSet:
    """The kv heads with the best query heads, as many as `part` of the budget lets keep everything; all of their heads.

    Raises UsageError for a part that is not in [0, 1). Source: ours, after DuoAttention's quantile.
    Cannot show: whether a head needs all of its keys; scores only rank.
    """
    if not 0 <= part < 1:
        raise UsageError(f"part={part} is not in [0, 1): it is the part of the budget that goes to whole heads.")
    layout = scores.layout
    best = scores.by_group()
    # a layer without a score is none that keys are chosen in
    count = int(part * share * int((best > -torch.inf).any(1).sum()) * layout.kv_heads)
    order = best.flatten().argsort(descending=True, stable=True)[:count].tolist()
    # a head without a score is not chosen
    order = [i for i in order if best.flatten()[i] > -torch.inf]
    each = layout.heads // layout.kv_heads
    named = [(i // layout.kv_heads, each * (i % layout.kv_heads) + j) for i in order for j in range(each)]
    return HeadSet.parse(named) if named else HeadSet()


def relative(weights: Float[Tensor, "l g"], share: float) -> Float[Tensor, "l g"]:
    """Shares in proportion to weights, none above 1, whose mean is `share`."""
    weights = weights.double().clamp(min=1e-9)
    low, high = 0.0, float(1 / weights.min())
    # the mean grows with the factor: halving finds it
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((weights * middle).clamp(max=1).mean()) < share else (low, middle)
    return (weights * high).clamp(max=1).float()


def spread_over(weights: Float[Tensor, "l g"], choose: Bool[Tensor, "l"], share: float) -> Float[Tensor, "l g"]:
    """`relative` in the layers that `choose` names; the others keep everything."""
    shares = torch.ones_like(weights)
    shares[choose] = relative(weights[choose], share)
    return shares


def falling(total: int, layers: int, most: int) -> list[int]:
    """`total` in whole numbers over layers, none above `most`, falling linearly towards 0 as far as that lets it."""
    weights = torch.arange(layers, 0, -1, dtype=torch.float64)
    exact = relative(weights[:, None], total / (layers * most))[:, 0].double() * most
    counts = exact.floor().long()
    # the largest remainders get what rounding left, earlier layers first
    left = total - int(counts.sum())
    order = (exact - counts).argsort(descending=True, stable=True)[: max(0, left)]
    counts[order] += 1
    return counts.clamp(max=most).tolist()


def grouped(values: Float[Tensor, "b h k"], groups: int) -> Float[Tensor, "b g k"]:
    """The mean over the query heads of each kv head."""
    return values.unflatten(1, (groups, -1)).mean(2)
