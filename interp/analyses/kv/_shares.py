"""How a share of the keys is divided among layers and kv heads."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.errors import UsageError

NO_GLOBAL_LAYERS = (
    "every layer of this model has a sliding window, so a selector has no keys to drop; use a model that has layers "
    "with full attention, and leave kv out of the analyses of this one."
)


def global_layers(module: nn.Module, layers: int) -> Bool[Tensor, "l"]:
    """The layers of an attention module's model without a sliding window, whose caches hold every key."""
    from transformers import DynamicCache

    config: Any = module.config
    slides = [bool(getattr(layer, "is_sliding", False)) for layer in DynamicCache(config=config).layers]
    return ~torch.tensor(slides or [False] * layers)


def remaining_ratio(keep_ratio: float, full: Bool[Tensor, "l g"]) -> float:
    """The share of the kv heads without a full cache, so that all kv heads together keep `keep_ratio`."""
    fixed = float(full.float().mean())
    if fixed >= keep_ratio:
        raise UsageError(
            f"keep_ratio={keep_ratio} is too small: {int(full.sum())} of {full.numel()} kv heads keep everything, "
            f"which is {fixed:.2f} of the keys; give a larger ratio, or fewer heads with a full cache."
        )
    return (keep_ratio - fixed) / (1 - fixed)


def relative(weights: Float[Tensor, "l g"], keep_ratio: float) -> Float[Tensor, "l g"]:
    """Shares in proportion to weights, none above 1, whose mean is `keep_ratio`."""
    weights = weights.double().clamp(min=1e-9)
    low, high = 0.0, float(1 / weights.min())
    # the mean grows with the factor: bisection finds it
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((weights * middle).clamp(max=1).mean()) < keep_ratio else (low, middle)
    return (weights * high).clamp(max=1).float()


def spread_over(weights: Float[Tensor, "l g"], choose: Bool[Tensor, "l"], keep_ratio: float) -> Float[Tensor, "l g"]:
    """`relative` in the layers that `choose` names; the others keep everything."""
    shares = torch.ones_like(weights)
    shares[choose] = relative(weights[choose], keep_ratio)
    return shares


def falling(total: int, layers: int, most: int) -> list[int]:
    """`total` as whole numbers over layers, none above `most`, that fall linearly towards 0 as far as `most` allows."""
    weights = torch.arange(layers, 0, -1, dtype=torch.float64)
    exact = relative(weights[:, None], total / (layers * most))[:, 0].double() * most
    counts = exact.floor().long()
    # the largest remainders get the rest, earlier layers first
    left = total - int(counts.sum())
    order = (exact - counts).argsort(descending=True, stable=True)[: max(0, left)]
    counts[order] += 1
    return counts.clamp(max=most).tolist()


def grouped(values: Float[Tensor, "b h k"], groups: int) -> Float[Tensor, "b g k"]:
    """The mean over the query heads of each kv head."""
    return values.unflatten(1, (groups, -1)).mean(2)
