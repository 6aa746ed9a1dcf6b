"""Attribution patching: activation patching of all heads at once, by a gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses.identify._prompt_pairs import Direction, Metric, effects, logit_difference, measured
from interp.analyses.measures.head_outputs import ids
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ModelError, UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts

ROOT = "blocks.0.hook_resid_pre"
"""where the backward ends"""


def attribution_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts,
    metric: Metric = logit_difference,
    *,
    direction: Direction = "denoise",
    normalize: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Activation patching of every head to first order, from two forwards and one backward.

    effect[b l h] = sum over q, d of (z_clean - z_corrupt)[b q h d] dM/dz[b q h d], the gradient taken at the run that
    would be patched: the corrupt one for direction "denoise", the clean one for "noise". It estimates the effect that
    activation_patching measures, with the same sign. Score, arguments and errors are as there: by default the effect
    over M_clean - M_corrupt. Compare the two methods, or two circuits, by `a.compare(b, k)`.
    The metric must have a gradient, else UsageError.
    Source: Nanda 2023, Syed et al. 2310.10348; TransformerLens' cache_activation_and_gradient, whose node scores are
    these by position. Differs: per pair, both directions, no integrated gradients.
    Cannot show: effects where attention or the final norm saturates, where the gradient vanishes and patching does not.
    """
    name, measure = "attribution_patching", partial(_first_order, metric)
    return effects(name, model, clean, corrupt, metric, measure, direction, normalize, batch_size, seed, progress)


@torch.enable_grad()
def _first_order(
    metric: Metric, tl: Any, base: Prompts, source: Prompts, clean: Prompts, done: Callable[[], Any]
) -> tuple[Float[Tensor, "b l h"], Float[Tensor, "b"], Float[Tensor, "b"]]:
    """Sum over q, d of (z_source - z_base) dM/dz_base, and the metric at both runs."""
    from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(HeadLayout.of(tl).layers)]
    # the backward goes as far as what it is asked for, and hook_z shows a view that nothing else is made from
    asked = [ROOT, *names]
    seen: list[Tensor] = []

    def total(logits: Tensor) -> Tensor:
        values = measured(metric, logits, clean)
        seen.append(values.detach().cpu())
        if torch.is_grad_enabled() and not values.requires_grad:
            raise UsageError("the metric has no gradient: compute it from the logits by differentiable steps.")
        # rows of a batch do not see each other, so the sum has the gradient of each
        return values.sum()

    with torch.no_grad():
        there = cache_activation_and_gradient(tl, ids(source, tl), total, names, compute_gradient=False)
    with tl.hooks(fwd_hooks=[("hook_embed", _rooted)]):
        here = cache_activation_and_gradient(tl, ids(base, tl), total, asked)
    rows = []
    for name in names:
        gradient = here.gradients.get(name)
        if gradient is None:
            raise ModelError(
                f"no gradient reached {name}: the metric does not see that layer, so use activation_patching."
            )
        delta = there.activations[name].float() - here.activations[name].float()
        rows.append((delta * gradient.float()).sum((1, 3)).cpu())
        done()
    return torch.stack(rows, 1), seen[1], seen[0]


def _rooted(x: Tensor, hook: Any) -> Tensor | None:
    # where no weight before it asks for a gradient
    return None if x.requires_grad else x.detach().requires_grad_()
