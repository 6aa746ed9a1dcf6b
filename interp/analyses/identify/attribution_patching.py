"""Attribution patching: activation patching of all heads at once, estimated by a gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses import costs, memory
from interp.analyses.causal import controls
from interp.analyses.identify._prompt_pairs import Direction, Metric, effects, measured
from interp.analyses.measures.answer_logits import logit_difference
from interp.analyses.measures.head_outputs import ids
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import ModelError, UsageError
from interp.hooks.edit.layer_checkpoints import layer_checkpoints, without_cache
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts

ROOT = "blocks.0.hook_resid_pre"
"""site at which the backward pass ends"""


@analysis(
    title="Attribution patching",
    group="patching",
    order=24,
    prompts=standard.ioi,
    paired=True,
    joint=True,
    resumable=True,
    own_prompts=False,
    control=controls.logit_difference(),
    cost=costs.first_order(),
    source_settings={"direction": "noise"},
)
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
    folder: Any = None,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its effect under activation patching to first order.

    It takes two forward passes and one backward pass.

    `effect[n l h] = sum over q, d of (z_clean - z_corrupt)[n q h d] dM/dz[n q h d]`, with the gradient at the run that
    would be patched: the corrupt one for the direction "denoise", the clean one for "noise". It estimates the effect
    that `activation_patching` measures, with the same sign. As there, `score[n l h] = effect[n l h] / D`, where D is
    the mean of M_clean - M_corrupt over the pairs that count: those with M_clean > M_corrupt.

    `scores.compare(other, k)` compares two tables, such as those of the two methods.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        clean: Clean prompts, such as the first side of `tasks.ioi` or `tasks.colored_objects`.
        corrupt: The partner of each clean prompt, of equal token length.
        metric: By default the logit difference of the clean prompts' meta["right"] and meta["wrong"] (first tokens).
            Else a function of the logits [b v] at the last position and the clean prompts [b] that gives [b], with a
            gradient.
        direction: "denoise" patches the clean run into the corrupt one (is the head sufficient?), "noise" the reverse
            (is it necessary?).
        normalize: Divide by D, so that 1 is a head that carries all of the difference. False gives the effect itself.
        batch_size: Number of pairs per forward pass.
        seed: Seed of the confidence intervals over prompts.
        folder: Where finished batches of pairs are kept, so that an interrupted analysis continues with the same
            numbers.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, positive for a head that supports the clean answer, NaN for a pair
        that does not count. The extra "difference" holds M_clean - M_corrupt of each pair, the same for every head.
        With `normalize`, the setting "mean_difference" holds D.

    Raises:
        PromptError: If the prompts are not pairs of equal length, or have no answers.
        UsageError: If a setting is unknown, or the metric gives anything but finite numbers, or has no gradient.
        ModelError: If no bridge can be made, or the model is in training mode.
        CostError: If the activations of a batch do not fit into the free memory.

    Examples:
        >>> answers = {"right": ["x"], "wrong": ["y"]}
        >>> clean = interp.Prompts.encode(tokenizer, [{"text": "x y x", "meta": answers}])
        >>> corrupt = interp.Prompts.encode(tokenizer, [{"text": "x y y", "meta": answers}])
        >>> interp.identify.attribution_patching(model, clean, corrupt).per_prompt.shape
        torch.Size([1, 2, 4])

    Source:
        Nanda 2023, Syed et al. 2310.10348; TransformerLens' cache_activation_and_gradient, whose node scores are these
        by position.

    Differs:
        Scores are given for each pair, either direction can be chosen, and gradients are not integrated. Effects are
        divided by the mean difference of the pairs that count, and pairs without the behaviour are left out.

    Limits:
        Does not show effects where attention or the final norm saturates: the gradient vanishes there and the effect of
        patching does not. Intervals take the mean difference as known.
    """
    name, measure = "attribution_patching", partial(_first_order, metric)
    memory.check(name, memory.first_order, model, memory.sorted_batches(clean, batch_size), {})
    return effects(
        name, model, clean, corrupt, metric, measure, direction, normalize, batch_size, seed, folder, progress
    )


@torch.enable_grad()
def _first_order(
    metric: Metric, tl: Any, base: Prompts, source: Prompts, clean: Prompts, done: Callable[[], Any]
) -> tuple[Float[Tensor, "b l h"], Float[Tensor, "b"], Float[Tensor, "b"]]:
    """Sum over q, d of (z_source - z_base) dM/dz_base, and the metric of both runs."""
    from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(HeadLayout.of(tl).layers)]
    # the backward pass goes only as far as the named sites, and hook_z gives a view that nothing else uses
    sites = [ROOT, *names]
    seen: list[Tensor] = []

    def total(logits: Tensor) -> Tensor:
        values = measured(metric, logits, clean)
        seen.append(values.detach().cpu())
        if torch.is_grad_enabled() and not values.requires_grad:
            raise UsageError("the metric has no gradient; compute it from the logits by differentiable steps.")
        # rows of a batch are independent, so the sum has the gradient of each
        return values.sum()

    with torch.no_grad():
        there = cache_activation_and_gradient(tl, ids(source, tl), total, names, compute_gradient=False)
    with without_cache(tl), layer_checkpoints(tl), tl.hooks(fwd_hooks=[("hook_embed", _rooted)]):
        here = cache_activation_and_gradient(tl, ids(base, tl), total, sites)
    rows = []
    for name in names:
        gradient = here.gradients.get(name)
        if gradient is None:
            raise ModelError(
                f"no gradient reached {name}, since the metric does not depend on that layer; use activation_patching."
            )
        delta = there.activations[name].float() - here.activations[name].float()
        rows.append((delta * gradient.float()).sum((1, 3)).cpu())
        done()
    return torch.stack(rows, 1), seen[1], seen[0]


def _rooted(x: Tensor, hook: Any) -> Tensor | None:
    """Make the embedding require a gradient where no weight before it does."""
    return None if x.requires_grad else x.detach().requires_grad_()
