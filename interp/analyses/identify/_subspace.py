"""Angles between the subspaces that prompts span."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

N_RESAMPLES = 200
"""bootstrap resamples of an interval"""


def angle(before: Float[Tensor, "p m"], after: Float[Tensor, "p m"], components: int = 1) -> float:
    """Sum in degrees of the principal angles between the spans of the first left singular vectors of two matrices.

    Args:
        before: One row for each prompt.
        after: The same prompts.
        components: Number of singular vectors.
    """
    from scipy.linalg import subspace_angles

    spaces = [_left(x, components) for x in (before, after)]
    return float(np.rad2deg(subspace_angles(*spaces)).sum())


def angle_interval(
    before: Float[Tensor, "p m"], after: Float[Tensor, "p m"], components: int = 1, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of `angle` over prompts, 95 %.

    The subspace of a resample is noisier, so the interval is biased upward.

    Args:
        before: One row for each prompt.
        after: The same prompts.
        components: Number of singular vectors.
        seed: Seed of the resampling.
    """
    random = torch.Generator().manual_seed(seed)
    resamples = [torch.randint(len(before), (len(before),), generator=random) for _ in range(N_RESAMPLES)]
    low, high = np.quantile([angle(before[rows], after[rows], components) for rows in resamples], [0.025, 0.975])
    return float(low), float(high)


def _left(x: Tensor, components: int) -> np.ndarray:
    # the Gram matrix is small: prompts are few
    values, vectors = torch.linalg.eigh(x @ x.T)
    return vectors[:, values.argsort(descending=True)[:components]].numpy()
