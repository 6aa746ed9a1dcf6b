"""How far the lines and planes that prompts span have turned."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 200
"""of the bootstrap"""


def angle(before: Float[Tensor, "p m"], after: Float[Tensor, "p m"], components: int = 1) -> float:
    """Sum in degrees of the principal angles between the spans of the first left singular vectors of two [p m]."""
    from scipy.linalg import subspace_angles

    spaces = [_left(x, components) for x in (before, after)]
    return float(np.rad2deg(subspace_angles(*spaces)).sum())


def angle_interval(
    before: Float[Tensor, "p m"], after: Float[Tensor, "p m"], components: int = 1, seed: int = 0
) -> tuple[float, float]:
    """95% interval of `angle` over prompts, bootstrap; a resampled subspace is a noisier one, so it lies high."""
    random = torch.Generator().manual_seed(seed)
    draws = [torch.randint(len(before), (len(before),), generator=random) for _ in range(DRAWS)]
    low, high = np.quantile([angle(before[rows], after[rows], components) for rows in draws], [0.025, 0.975])
    return float(low), float(high)


def _left(x: Tensor, components: int) -> np.ndarray:
    # of the small side: prompts are few
    values, vectors = torch.linalg.eigh(x @ x.T)
    return vectors[:, values.argsort(descending=True)[:components]].numpy()
