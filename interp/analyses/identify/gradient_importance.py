"""Gradient importance: the slope of a loss with respect to a gate on each head, from one backward pass."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import nn
from tqdm.auto import tqdm

from interp.analyses import costs, memory
from interp.analyses.causal import controls
from interp.analyses.measures.losses import Loss, batch_losses
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import ModelError, UsageError
from interp.hooks.edit.head_gate_gradient import gate_gradient
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

__all__ = ["by_layer", "gradient_importance", "supporting"]
Statistic = Literal["example", "position"]


@analysis(
    title="Gradient importance",
    group="importance",
    order=21,
    prompts=standard.passages,
    # shares of a layer could not be joined batch by batch
    run_settings={"normalize": None},
    control=controls.loss(),
    cost=costs.gradients(),
    source_settings={"statistic": "example in the paper, position in the code", "normalize": "layer"},
    shown_extras={"signed": "With its sign"},
)
def gradient_importance(
    model: nn.Module,
    prompts: Prompts,
    *,
    loss: Loss | None = None,
    statistic: Statistic = "example",
    normalize: Literal["layer"] | None = "layer",
    batch_size: int = 8,
    checkpoint: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by the absolute slope of the loss with respect to a gate on the head's output.

    Under "example", the statistic of the paper, `score[n l h] = |sum over q and d of z[n l h q d] (d loss[n] / d z)|`,
    which is |d loss / d gate| at gate 1. Under "position", that of the authors' code, `score[n l h] = mean over q of
    |sum over d of z (d loss / d z)|`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Any prompts, such as `tasks.passages`.
        loss: By default a prompt's mean next-token cross-entropy. Else a function `loss(logits [b q v], batch) -> [b]`
            of each row alone, such as a difference of logits[:, -1], which follow the last token of each prompt.
            Padding counts as far as that loss includes it.
        statistic: "example" or "position", as above. A sum over the batch before the absolute value (bertology) is
            refused, since it depends on the batch size.
        normalize: "layer" divides by the l2 norm over the heads of a layer of the mean over prompts (setting
            "layer_norms"). It is one constant for each layer and every prompt, so intervals are those of the mean at
            that norm, and heads of two layers compare as shares of their layers. None leaves slopes; tables of
            different prompts are joined with None, and `by_layer` normalises them after that.
        batch_size: Number of prompts per forward pass.
        checkpoint: Compute each layer again in the backward pass, so that only the inputs of the layers are stored.
            False is faster and takes far more memory; the scores are the same.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in loss per gate, or as shares of the layer's norm. Under "example"
            the extra "signed" [n l h] keeps the sign, above 0 where more of the head means more loss.

    Raises:
        ModelError: If the model is in float16, whose gradients overflow. bfloat16 works (setting "gradients"), with
            sums in float32.
        UsageError: If the loss has the wrong shape, is not finite or has no gradient, or a setting is unknown.
        CostError: If the activations of a batch do not fit into the free memory.

    Examples:
        >>> scores = interp.identify.gradient_importance(model, prompts)
        >>> scores.extras["signed"].shape
        torch.Size([2, 2, 4])

    Source:
        Michel et al. 1905.10650, section 4.1.

    Differs:
        Each prompt has the same weight, also under "position", and so has the token of every layer; the authors divide
        the last layer of BERT by examples.

    Limits:
        Does not show what other heads would take over. A saturated or a redundant head has no slope and may be needed.
    """
    if statistic not in get_args(Statistic) or normalize not in ("layer", None):
        raise UsageError(
            f"unknown statistic {statistic!r} or normalize {normalize!r}; statistic is 'example' or 'position' (a sum "
            "over the batch depends on its size), normalize is 'layer' or None."
        )
    network = unwrap(model)
    kinds = {parameter.dtype for parameter in network.parameters()}
    if torch.float16 in kinds:
        raise ModelError("the model is in float16, whose gradients overflow; load it in bfloat16 or float32.")
    given = {"loss": loss, "checkpoint": checkpoint}
    memory.check("gradient_importance", memory.gradients, model, memory.batches(prompts, batch_size), given)
    bar = tqdm(total=len(prompts), desc="gradient_importance", disable=not progress, delay=2, leave=False)
    parts = []
    with _frozen(network), torch.inference_mode(False), torch.enable_grad():
        for batch in prompts.batches(batch_size):
            with gate_gradient(network, by_position=statistic == "position", checkpoint=checkpoint) as gates:
                losses = batch_losses(network, batch, loss)
                if not losses.requires_grad:
                    raise UsageError("the loss has no gradient; compute it from the logits, without detach or argmax.")
                losses.sum().backward()
            parts.append(gates.gradient)
            bar.update(len(batch))
    bar.close()
    signed = torch.cat(parts)
    whole = "loss" if statistic == "example" else "loss by position"
    mean = signed if statistic == "example" else signed / torch.tensor(prompts.lengths)[:, None, None]
    scores = HeadScores(
        name="gradient_importance",
        per_prompt=mean.abs(),
        unit=f"{whole} per gate",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={
            "loss": "next token" if loss is None else getattr(loss, "__name__", type(loss).__name__),
            "statistic": statistic,
            "normalize": None,
            "gradients": ", ".join(
                sorted(str(kind).removeprefix("torch.") for kind in kinds if kind.is_floating_point)
            ),
        },
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={"signed": signed} if statistic == "example" else {},
        seed=seed,
        labels=tuple(f"{length} tokens" for length in prompts.lengths),
    )
    return scores if normalize is None else by_layer(scores)


def by_layer(scores: HeadScores) -> HeadScores:
    """Divide scores by the l2 norm of their layer over heads.

    `value[l h] = mean[l h] / sqrt(sum over h of mean[l h]^2)`. The norms are stored in the settings, so that only
    tables with equal norms can be joined.

    Args:
        scores: Scores of `gradient_importance(normalize=None)`.

    Returns:
        HeadScores: The same scores as shares of their layer's norm.

    Raises:
        UsageError: If the scores are normalised already.

    Examples:
        >>> slopes = interp.identify.gradient_importance(model, prompts, normalize=None)
        >>> interp.identify.by_layer(slopes).unit
        "share of the layer's norm"
    """
    if scores.settings.get("normalize") is not None:
        raise UsageError(
            f"scores '{scores.name}' are shares of their layers already; give slopes, from normalize=None."
        )
    norms = scores.values.double().norm(dim=1)
    return replace(
        scores,
        # a layer without any slope stays at 0
        per_prompt=(scores.per_prompt / norms.clamp(min=1e-20)[:, None]).float(),
        unit="share of the layer's norm",
        settings={**scores.settings, "normalize": "layer", "layer_norms": norms.tolist()},
    )


def supporting(scores: HeadScores) -> HeadScores:
    """Score each head by what it takes off the loss: the slope with its sign turned.

    `score[n l h] = - d loss[n] / d gate`, above 0 where more of the head means less loss. Heads that oppose the tokens
    of the loss come last, however large their slope.

    Args:
        scores: Scores of `gradient_importance(statistic="example", normalize=None)`.

    Returns:
        HeadScores: The scores, with the slopes as the extra "signed" and their size as the extra "absolute".

    Raises:
        UsageError: If the scores have no sign, or are shares of their layers.

    Examples:
        >>> slopes = interp.identify.gradient_importance(model, prompts, normalize=None)
        >>> found = interp.identify.supporting(slopes)
        >>> bool((found.per_prompt.abs() == slopes.per_prompt).all())
        True
    """
    if "signed" not in scores.extras or scores.settings.get("normalize") is not None:
        raise UsageError(
            f"scores '{scores.name}' have no slopes with a sign; give those of gradient_importance with "
            "statistic='example' and normalize=None."
        )
    return replace(
        scores,
        per_prompt=-scores.extras["signed"],
        unit="loss taken off per gate",
        extras={**scores.extras, "absolute": scores.per_prompt},
        settings={**scores.settings, "sign": "turned"},
    )


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Turn off the gradients of all parameters, so that none are computed and none are left on the model."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
