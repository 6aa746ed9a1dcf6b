"""How far numbers lie apart, where some do not count."""

from torch import Tensor


def spread(values: Tensor, dim: int) -> Tensor:
    """Population std along an axis over what is not NaN; NaN where nothing counts."""
    return (values - values.nanmean(dim, keepdim=True)).square().nanmean(dim).sqrt()
