"""How well one number a prompt tells attacked prompts from normal ones, where low ones speak for an attack."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Detection:
    """How well focus scores tell injected prompts from normal ones."""

    normal: Float[Tensor, "n"]
    """focus scores"""
    attacked: Float[Tensor, "m"]
    auroc: float
    """share of pairs of a normal and an attacked prompt in which the attacked one has the lower score; 0.5 is chance"""
    curve: tuple[tuple[float, float, float], ...]
    """(share of normal prompts flagged, share of attacked ones flagged, at scores up to this), from none to all"""
    threshold: float
    caught: float
    """share of attacked prompts at or below the threshold"""
    false_alarms: float
    """share of normal prompts at or below it"""

    @classmethod
    def of(cls, normal: Float[Tensor, "n"], attacked: Float[Tensor, "m"], threshold: float) -> "Detection":
        """Of scores without NaN."""
        from sklearn.metrics import roc_auc_score, roc_curve

        truth, low = [0] * len(normal) + [1] * len(attacked), -torch.cat([normal, attacked]).double().numpy()
        flagged, caught, at = roc_curve(truth, low, drop_intermediate=False)
        return cls(
            normal,
            attacked,
            auroc=float(roc_auc_score(truth, low)),
            curve=tuple(zip(flagged.tolist(), caught.tolist(), (-at).tolist(), strict=True)),
            threshold=threshold,
            caught=float((attacked <= threshold).float().mean()),
            false_alarms=float((normal <= threshold).float().mean()),
        )
