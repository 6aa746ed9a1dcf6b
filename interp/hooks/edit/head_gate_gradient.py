"""The gradient of a loss with respect to a gate on each head's output, for all heads from one backward pass."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from interp.errors import UsageError
from interp.hooks.edit.layer_checkpoints import LayerCheckpoints, layer_checkpoints
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import attention_layers, projection_inputs, unwrap
from interp.hooks.model.repeats import is_repeating
from interp.hooks.model.torch_state import own_state


@contextlib.contextmanager
def gate_gradient(model: nn.Module, *, by_position: bool = False, checkpoint: bool = True) -> Iterator["GateGradient"]:
    """Record the gradient of a loss with respect to a gate on each head's output, for all heads in one backward pass.

    `gradient[b l h] = sum over q and d of (d loss / d z)[b l h q d] z[b l h q d]`. This is `d loss / d gate[b l h]` of
    `out = gate z` at gate 1: to first order, the effect on the loss of scaling the head's output.

    Gradients are added up over the backward passes of one context. Their sign is kept. A mean loss is divided by the
    tokens of the whole batch, so values per prompt are shares of it. Padding counts as far as the loss depends on it,
    which with labels of -100 it does not.

    Only outputs and their gradients are used. Attention runs forward and backward on the model's own fast path, at any
    length, and nothing is n x n. The backward pass computes each layer again, so that only the inputs of the layers are
    stored, see `layer_checkpoints`; a pass with a cache of keys stores everything, so give `use_cache=False`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        by_position: Sum `|sum over d|` over q instead, so that positions of different signs do not cancel.
        checkpoint: Compute the layers again in the backward pass. False stores what they computed, which is faster and
            takes far more memory; the gradients are the same.

    Yields:
        GateGradient: Its `gradient` is Float32 `[b l h]`, on the CPU.

    Raises:
        UsageError: If the forward pass runs under no_grad, or the gradient is read before a backward pass.

    Examples:
        >>> from interp.hooks.edit.head_gate_gradient import gate_gradient
        >>> with gate_gradient(model) as gates:
        ...     inputs = prompts.tensors()
        ...     model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        >>> gates.gradient.shape
        torch.Size([2, 2, 4])

    Source:
        Michel et al. 1905.10650, section 4.1, before its absolute value and its normalisation by layer.

    Limits:
        Does not show what a head does that another would take over. A saturated head has no slope.
    """
    model = unwrap(model)
    layers = attention_layers(model)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(layer_checkpoints(model)) if checkpoint else None
        gates = GateGradient(HeadLayout.of(model), by_position, checkpoints)
        stack.enter_context(projection_inputs(model, layers, gates.watch, inside=True))
        yield gates


@dataclass(eq=False)
class GateGradient:
    """The gradients that `gate_gradient` records."""

    layout: HeadLayout
    by_position: bool = False
    checkpoints: LayerCheckpoints | None = None
    _sums: dict[int, Tensor] = field(default_factory=dict)

    def watch(self, layer: int, x: Tensor) -> None:
        """Register the product of x [b q h*d] with its gradient, to be summed in the backward pass."""
        if not torch.is_grad_enabled():
            raise UsageError("gate_gradient was given a forward pass under no_grad: run it with gradients.")
        if not x.requires_grad:
            # with frozen weights the loss still depends on x
            x.requires_grad_()
        call = None if self.checkpoints is None else self.checkpoints.call
        # z by a name, so that a layer that is computed again gives it anew
        kept = {"z": x.detach()} if call is None else call.recomputed
        if call is not None and is_repeating():
            kept["z"] = x.detach()
            # the gradient arrives at the x of the first call
            return

        @own_state()
        def add(gradient: Tensor) -> None:
            z = kept.pop("z") if call is not None else kept["z"]
            # one row of the batch at a time keeps the float32 copies small
            rows = [
                (g.float() * r.float()).unflatten(-1, (self.layout.heads, -1)).sum(2)
                for g, r in zip(gradient, z, strict=True)
            ]
            total = torch.stack([(row.abs() if self.by_position else row).sum(0) for row in rows]).cpu()
            before = self._sums.get(layer)
            if before is not None and len(before) != len(total):
                raise UsageError(
                    f"batches of {len(before)} and {len(total)} rows ran in one gate_gradient: open one for each batch."
                )
            self._sums[layer] = total if before is None else before + total

        x.register_hook(add)

    @property
    def gradient(self) -> Tensor:
        """Float `[b l h]`, the sum over the backward passes so far."""
        missing = [layer for layer in range(self.layout.layers) if layer not in self._sums]
        if missing:
            raise UsageError(f"no gradient reached layers {missing}: call backward() on a loss inside the context.")
        return torch.stack([self._sums[layer] for layer in range(self.layout.layers)], 1)
