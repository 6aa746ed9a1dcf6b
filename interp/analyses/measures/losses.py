"""Losses of prompts under a model as it is, ablated or steered: one number a prompt, without all logits at once."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from interp.errors import PromptError, UsageError
from interp.hooks.model.layers import unwrap
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs

Loss = Callable[[Tensor, Prompts], Tensor]
"""logits [b q v] of a batch, padded on the left, and its prompts, to [b]: each row's own loss"""
HELD = 1 << 25
"""logits held at once, in numbers"""
IGNORED = -100


def token_losses(
    model: nn.Module,
    prompts: Prompts,
    batch_size: int = 8,
    *,
    loss: Loss | None = None,
    progress: str | None = None,
) -> Float[Tensor, "p"]:
    """Mean next-token cross-entropy of each prompt, in nats per token; float32, on the CPU.

    loss[p] = mean over q > 0 of -log softmax over v of logits[p q-1 v] at token q. Padding counts for nothing, and the
    head of the model is applied to a few positions at a time. Contexts that are open on the model act: `ablate`, or
    `steering`, which knows one batch where it names spans, so open it for each batch there.
    loss: another one, of all logits of a batch. progress: title of a tqdm bar.
    Raises PromptError for a prompt of one token, UsageError for a loss of the wrong shape or one that is not finite.
    Cannot show: which tokens a prompt is lost on; a mean hides the few that a head serves.
    """
    if not len(prompts):
        raise PromptError("no prompts to take losses of; the selection is empty.")
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, delay=2, leave=False)
    parts = []
    for batch in prompts.batches(batch_size):
        with torch.no_grad():
            parts.append(batch_losses(model, batch, loss).float().cpu())
        bar.update(len(batch))
    bar.close()
    return torch.cat(parts)


def batch_losses(model: nn.Module, batch: Prompts, loss: Loss | None = None) -> Float[Tensor, "b"]:
    """As `token_losses`, for one forward; with a graph where gradients are on."""
    network: Any = unwrap(model)
    inputs = model_inputs(network, batch)
    if loss is None:
        if min(batch.lengths) < 2:
            raise PromptError("a prompt has one token, so that nothing is predicted in it: give at least two tokens.")
        values = _next_token(network, inputs)
    else:
        values = loss(network(**inputs, use_cache=False).logits, batch)
    if not isinstance(values, Tensor) or values.shape != (len(batch),):
        given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UsageError(f"the loss of a batch of {len(batch)} prompts is {given}: give one number a prompt, [b].")
    for value, length in zip(values.tolist(), batch.lengths, strict=True):
        if not abs(value) < torch.inf:
            raise UsageError(
                f"the loss of a prompt of {length} tokens is {value}: give a loss that is finite for it, or leave the "
                "prompt out."
            )
    return values


def _next_token(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    # the first token of a padded row would be predicted from padding
    targets = ids[:, 1:].masked_fill(~real[:, :-1], IGNORED)
    body, found = model.base_model, []
    handle = body.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        whole = {} if body is model else {"logits_to_keep": 1}
        output = model(**inputs, use_cache=False, **whole)
    finally:
        handle.remove()
    if body is model:
        return _mean(_entropy(output.logits[:, :-1], targets), targets)

    def part(hidden: Tensor, wanted: Tensor) -> Tensor:
        # soft-caps and scales come after the head, in the model's own code
        setattr(model, model.base_model_prefix, _Given(type(found[0])(last_hidden_state=hidden)))
        try:
            return _entropy(model(**inputs, use_cache=False).logits, wanted)
        finally:
            setattr(model, model.base_model_prefix, body)

    hidden = found[0].last_hidden_state[:, :-1]
    step = max(1, HELD // (len(ids) * model.config.get_text_config().vocab_size))
    # a backward pass makes the logits again
    parts = [
        checkpoint(part, *both, use_reentrant=False, preserve_rng_state=False)
        for both in zip(hidden.split(step, 1), targets.split(step, 1), strict=True)
    ]
    return _mean(torch.cat(parts, 1), targets)


class _Given(nn.Module):
    """The body of a model that has run already."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _entropy(logits: Float[Tensor, "b q v"], targets: Int[Tensor, "b q"]) -> Float[Tensor, "b q"]:
    flat = logits.float().transpose(1, 2)
    return nn.functional.cross_entropy(flat, targets.to(logits.device), ignore_index=IGNORED, reduction="none")


def _mean(losses: Float[Tensor, "b q"], targets: Int[Tensor, "b q"]) -> Float[Tensor, "b"]:
    return losses.sum(1) / (targets != IGNORED).sum(1).to(losses.device)
