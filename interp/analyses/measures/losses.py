"""Losses of prompts, one number for each, computed without holding all logits at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from interp.errors import PromptError, UsageError
from interp.hooks.model.finite import check_model
from interp.hooks.model.layers import unwrap
from interp.hooks.model.scope import ModuleHook, module_hooks
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import model_inputs

Loss = Callable[[Tensor, Prompts], Tensor]
"""a function of the logits `[b q v]` of a batch, padded on the left, and its prompts, that returns losses `[b]`"""
MAX_HELD_LOGITS = 1 << 25
"""numbers of logits that are held at once"""
IGNORED_TOKEN = -100


def token_losses(
    model: nn.Module,
    prompts: Prompts,
    batch_size: int = 8,
    *,
    loss: Loss | None = None,
    progress: str | None = None,
) -> Float[Tensor, "p"]:
    """Mean next-token cross-entropy of each prompt, in nats per token.

    `loss[p] = mean over q > 0 of -log softmax over v of logits[p q-1 v] at token q`. Padding does not count, and the
    unembedding is applied to a few positions at a time.

    Contexts that are open on the model act, such as `ablate`. A `steering` context with spans belongs to one batch, so
    open it for each batch.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: The prompts.
        batch_size: Number of prompts per forward pass.
        loss: Function `loss(logits, batch) -> [b]` in place of the cross-entropy; it holds all logits of a batch.
        progress: Title of a progress bar; None for no bar.

    Returns:
        Tensor: float32 `[p]`, on the CPU.

    Raises:
        PromptError: If there are no prompts, or a prompt has one token.
        UsageError: If a loss has the wrong shape or is not finite.

    Examples:
        >>> from interp.analyses.measures.losses import token_losses
        >>> token_losses(model, prompts).shape
        torch.Size([2])

    Limits:
        Does not show which tokens a prompt is predicted badly on: a mean hides the few that depend on a head.
    """
    if not len(prompts):
        raise PromptError("the selection of prompts is empty; give at least one prompt.")
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, delay=2, leave=False)
    parts = []
    for batch in prompts.batches(batch_size):
        with torch.no_grad():
            parts.append(batch_losses(model, batch, loss).float().cpu())
        bar.update(len(batch))
    bar.close()
    return torch.cat(parts)


def batch_losses(model: nn.Module, batch: Prompts, loss: Loss | None = None) -> Float[Tensor, "b"]:
    """As `token_losses`, for one forward pass, with a graph where gradients are enabled.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        batch: The prompts.
        loss: Function `loss(logits, batch) -> [b]` in place of the cross-entropy.

    Raises:
        PromptError: If a prompt has one token.
        UsageError: If the loss has the wrong shape or is not finite.
        ModelError: If the logits of the model are NaN or infinite.
    """
    network: Any = unwrap(model)
    inputs = model_inputs(network, batch)
    if loss is None:
        if min(batch.lengths) < 2:
            raise PromptError("a prompt has one token, so nothing is predicted in it; give at least two tokens.")
        values = _next_token(network, inputs)
    else:
        last = {"logits_to_keep": loss.n_last(batch)} if isinstance(loss, SpanLoss) else {}
        values = loss(network(**inputs, use_cache=False, **last).logits, batch)
    if not isinstance(values, Tensor) or values.shape != (len(batch),):
        given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UsageError(
            f"the loss of a batch of {len(batch)} prompts is {given}; return one number for each prompt, [b]."
        )
    for value, length in zip(values.tolist(), batch.lengths, strict=True):
        if not abs(value) < torch.inf:
            # a model that computes NaN is named before a loss that does
            check_model(network, inputs)
            raise UsageError(
                f"the loss of a prompt of {length} tokens is {value}; give a loss that is finite for it, or leave the "
                "prompt out."
            )
    return values


@dataclass(frozen=True)
class SpanLoss:
    """A loss for `token_losses`: mean cross-entropy of the tokens of a span.

    Args:
        span: Name of a span that every prompt has, and that does not begin at its first token.
    """

    span: str

    def __call__(self, logits: Tensor, batch: Prompts) -> Tensor:
        """The losses `[b]`.

        Args:
            logits: Logits `[b q v]` of at least the last `n_last(batch)` positions.
            batch: The prompts.
        """
        found = []
        for row, prompt in zip(logits, batch, strict=True):
            ids = torch.tensor(prompt.ids, device=logits.device)
            places = torch.tensor(self._places(prompt))
            # rows are padded on the left
            before = row[places + len(row) - len(ids) - 1].float()
            found.append(nn.functional.cross_entropy(before, ids[places]))
        return torch.stack(found)

    def n_last(self, batch: Prompts) -> int:
        """Number of last positions whose logits the loss needs.

        Args:
            batch: The prompts.
        """
        return max(len(prompt) - min(self._places(prompt)) + 1 for prompt in batch)

    def _places(self, prompt: Prompt) -> list[int]:
        return [q for start, stop in prompt.spans[self.span] for q in range(start, stop)]


def _next_token(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    # the first token of a padded row would be predicted from padding
    targets = ids[:, 1:].masked_fill(~real[:, :-1], IGNORED_TOKEN)
    body, found = model.base_model, []
    with module_hooks([ModuleHook(body, lambda module, args, output: found.append(output), after=True)]):
        whole = {} if body is model else {"logits_to_keep": 1}
        output = model(**inputs, use_cache=False, **whole)
    if body is model:
        return _mean(_entropy(output.logits[:, :-1], targets), targets)

    def part(hidden: Tensor, wanted: Tensor) -> Tensor:
        # soft-caps and scales follow the unembedding, in the code of the model
        setattr(model, model.base_model_prefix, _FinishedBody(type(found[0])(last_hidden_state=hidden)))
        try:
            return _entropy(model(**inputs, use_cache=False).logits, wanted)
        finally:
            setattr(model, model.base_model_prefix, body)

    hidden = found[0].last_hidden_state[:, :-1]
    step = max(1, MAX_HELD_LOGITS // (len(ids) * model.config.get_text_config().vocab_size))
    # the backward pass computes the logits again
    parts = [
        checkpoint(part, *both, use_reentrant=False, preserve_rng_state=False)
        for both in zip(hidden.split(step, 1), targets.split(step, 1), strict=True)
    ]
    return _mean(torch.cat(parts, 1), targets)


class _FinishedBody(nn.Module):
    """Takes the place of the body of a model and returns its output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _entropy(logits: Float[Tensor, "b q v"], targets: Int[Tensor, "b q"]) -> Float[Tensor, "b q"]:
    # one row for each token: a softmax along an inner axis is over 100 times slower on a GPU
    rows, wanted = logits.float().flatten(0, 1), targets.to(logits.device)
    losses = nn.functional.cross_entropy(rows, wanted.flatten(), ignore_index=IGNORED_TOKEN, reduction="none")
    return losses.view(wanted.shape)


def _mean(losses: Float[Tensor, "b q"], targets: Int[Tensor, "b q"]) -> Float[Tensor, "b"]:
    return losses.sum(1) / (targets != IGNORED_TOKEN).sum(1).to(losses.device)
