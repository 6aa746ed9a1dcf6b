"""What the heads of a score do when they are out: the control beside tables that no task of their own checks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.curve import Curve, causal_curve
from interp.analyses.identify.pairs import logit_difference, measured
from interp.analyses.losses import token_losses
from interp.analyses.scores import HeadScores
from interp.hooks.capture import placed
from interp.hooks.prompts import Prompts

OF_ANSWERS = ("activation_patching", "path_patching", "attribution_patching", "logit_attribution")
"""scores of heads that speak for the right answer: controlled by the logit difference"""
CONTROLLED = ("importance", *OF_ANSWERS)


def control(name: str, model: nn.Module, prompts: Prompts, scores: HeadScores, **settings: Any) -> Curve:
    """A causal curve of a table's top heads, zeroed: loss for importance, logit difference for the others.

    The prompts are those that the scores were made from, so the heads are flattered by about their intervals.
    """
    k, size = settings.pop("k"), settings.pop("batch_size")
    measure: Callable[[nn.Module], Tensor]
    if name in OF_ANSWERS:
        known, measure = "logit difference", lambda model: differences(model, prompts, size)
    else:
        known, measure = "loss, nats per token", lambda model: token_losses(model, prompts, size)
    sizes = sorted({max(1, k // 3), k})
    return causal_curve(model, {name: scores}, {known: measure}, sizes=sizes, kind="zero", **settings)


def differences(model: Any, prompts: Prompts, batch_size: int = 8) -> Tensor:
    """Logit of the right answer less that of the wrong one after each prompt, as the model stands."""
    parts = []
    for batch in prompts.batches(batch_size):
        with torch.no_grad():
            logits = model(**placed(model, batch), use_cache=False, logits_to_keep=1).logits
        parts.append(measured(logit_difference, logits, batch).cpu())
    return torch.cat(parts)
