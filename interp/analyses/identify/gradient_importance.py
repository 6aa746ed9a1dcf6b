"""Head importance: how fast a loss moves when what a head writes is scaled, for all heads from one backward pass."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import nn
from tqdm.auto import tqdm

from interp.analyses.measures.losses import Loss, batch_losses
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ModelError, UsageError
from interp.hooks.edit.head_gate_gradient import gate_gradient
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

Statistic = Literal["example", "position"]


def gradient_importance(
    model: nn.Module,
    prompts: Prompts,
    *,
    loss: Loss | None = None,
    statistic: Statistic = "example",
    normalize: Literal["layer"] | None = "layer",
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Importance: the slope of the loss with respect to a gate on the head's output, without its sign.

    "example", the paper: score[n l h] = |sum over q and d of z[n l h q d] (d loss[n] / d z)|, which is
    |d loss / d gate| at gate 1; extras["signed"] [n l h] keeps the sign, above 0 where more of the head is more loss.
    "position", the authors' code: score[n l h] = mean over q of |sum over d of z (d loss / d z)|.
    normalize "layer" divides by the l2 norm over the heads of a layer of the mean over prompts (settings
    "layer_norms"): one constant a layer, for every prompt, so intervals are those of the mean at that norm. Heads of
    two layers compare as shares of their layers; None leaves slopes. Tables of different prompts are joined with None
    and `by_layer` after that.
    loss: by default a prompt's mean next-token cross-entropy; or loss(logits [b q v], batch) -> [b], each row's own, as
    a difference of logits[:, -1], which follow the last token of each prompt. Padding counts as far as that loss does.
    Raises ModelError for float16, whose gradients overflow; bfloat16 is taken (settings "gradients"), sums in float32.
    UsageError for a loss of the wrong shape, not finite, or without a gradient; for a sum over the batch before the
    absolute value (bertology), which depends on the batch size.
    Source: Michel et al. 1905.10650, section 4.1. Differs: each prompt weighs the same, also under "position", and so
    does every layer's token (the authors divide the last layer of BERT by examples).
    Cannot show: what other heads would take over; a saturated or a redundant head has no slope and may be needed.
    """
    if statistic not in get_args(Statistic) or normalize not in ("layer", None):
        raise UsageError(
            f"statistic={statistic!r}, normalize={normalize!r}: statistic is 'example' or 'position' (a sum over the "
            "batch depends on its size), normalize is 'layer' or None."
        )
    network = unwrap(model)
    kinds = {parameter.dtype for parameter in network.parameters()}
    if torch.float16 in kinds:
        raise ModelError("the model is in float16, whose gradients overflow: load it in bfloat16 or float32.")
    bar = tqdm(total=len(prompts), desc="gradient_importance", disable=not progress, delay=2, leave=False)
    parts = []
    with _frozen(network), torch.inference_mode(False), torch.enable_grad():
        for batch in prompts.batches(batch_size):
            with gate_gradient(network, by_position=statistic == "position") as gates:
                losses = batch_losses(network, batch, loss)
                if not losses.requires_grad:
                    raise UsageError("the loss has no gradient: make it from the logits, without detach or argmax.")
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
    """Scores as shares of their layer's l2 norm over heads; the norms go to the settings, so that only equal ones join.

    value[l h] = mean[l h] / sqrt(sum over h of mean[l h]^2). Raises UsageError for scores that are normalised already.
    """
    if scores.settings.get("normalize") is not None:
        raise UsageError(f"scores '{scores.name}' are shares of their layers already: normalise slopes, once.")
    norms = scores.values.double().norm(dim=1)
    return replace(
        scores,
        # a layer without any slope stays at 0
        per_prompt=(scores.per_prompt / norms.clamp(min=1e-20)[:, None]).float(),
        unit="share of the layer's norm",
        settings={**scores.settings, "normalize": "layer", "layer_norms": norms.tolist()},
    )


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without gradients: none are computed, and none are left on the model."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
