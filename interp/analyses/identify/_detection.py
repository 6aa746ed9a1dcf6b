"""Telling attacked prompts from normal ones by one number for each prompt, where low numbers indicate an attack."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Detection:
    """How well focus scores separate attacked from normal prompts."""

    normal: Float[Tensor, "n"]
    """focus scores of the normal prompts"""
    attacked: Float[Tensor, "m"]
    """focus scores of the attacked prompts"""
    auroc: float
    """share of pairs of a normal and an attacked prompt in which the attacked one has the lower score; 0.5 is chance"""
    curve: tuple[tuple[float, float, float], ...]
    """(share of normal prompts flagged, share of attacked prompts flagged, threshold), from no prompt to all"""
    threshold: float
    """score at or below which a prompt is flagged"""
    caught: float
    """share of attacked prompts at or below the threshold"""
    false_alarms: float
    """share of normal prompts at or below it"""

    @classmethod
    def of(cls, normal: Float[Tensor, "n"], attacked: Float[Tensor, "m"], threshold: float) -> "Detection":
        """Compute the AUROC, the curve and the rates at one threshold.

        Args:
            normal: Focus scores of normal prompts, without NaN.
            attacked: Focus scores of attacked prompts, without NaN.
            threshold: Score at or below which a prompt is flagged.
        """
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
