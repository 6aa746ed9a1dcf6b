"""Standard deviation where some numbers do not count."""

from torch import Tensor


def spread(values: Tensor, dim: int) -> Tensor:
    """Population std along an axis over all numbers that are not NaN; NaN where there is none."""
    return (values - values.nanmean(dim, keepdim=True)).square().nanmean(dim).sqrt()
