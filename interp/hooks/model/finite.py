"""NaN and infinity in what a model computes: an error that names the layer and the dtype, and never a number."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import ModelError, SpanError, UsageError
from interp.hooks.model.layers import attention_layers, unwrap
from interp.hooks.model.repeats import repeating
from interp.hooks.model.scope import ModuleHook, module_hooks
from interp.hooks.model.weights import compute_dtype

ADVICE = "load the model in bfloat16 or float32, and check that its weights are finite."


def finite_values(site: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what was read from an attention call, if it is finite.

    Rows of padding and rows that see no key are zero, so a NaN comes from a row that counts.

    Args:
        site: The attention call and its layer.
        values: One value for each reduction.

    Returns:
        tuple: The values, unchanged.

    Raises:
        ModelError: If a number is NaN or plus infinity.
    """
    # a sum needs no memory, and is not below infinity where a number is NaN or infinite; -inf is a hidden key
    sums = [x.sum().float() for value in values for x in _tensors(value) if x.is_floating_point() and x.numel()]
    if sums and not bool((torch.stack(sums) < torch.inf).all()):
        raise ModelError(
            f"the attention of layer {site.layer} is NaN or infinite in {_named(site.call.q.dtype)}; {ADVICE}"
        )
    return values


def check_output(model: nn.Module, output: Any, inputs: Mapping[str, Any]) -> Any:
    """Return the output of a forward pass, if its logits are finite, see `check_logits`."""
    check_logits(model, output.logits, inputs)
    return output


def check_logits(model: nn.Module, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return logits, if they are finite at the tokens that are no padding.

    Args:
        model: The model.
        logits: Logits `[b v]` after each prompt, or `[b q v]` of the last q positions.
        inputs: Arguments of the forward pass, by which the first layer that fails is found.

    Returns:
        Tensor: The logits, unchanged.

    Raises:
        ModelError: If a logit is NaN or plus infinity.
    """
    # a NaN stays in a maximum
    top = logits.detach().amax(-1)
    mask = inputs.get("attention_mask")
    if top.dim() == 2 and isinstance(mask, Tensor) and mask.dim() == 2:
        top = top.masked_fill(~mask[:, -top.shape[1] :].to(top.device).bool(), 0.0)
    if not bool((top < torch.inf).all()):
        check_model(model, inputs)
        # an open context does not take a second pass, so the layer is unknown
        dtype = compute_dtype(model)
        raise ModelError(f"the logits are NaN or infinite in {_named(dtype)}; {ADVICE}")
    return logits


def check_model(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run a model again to find the first layer whose attention output is not finite.

    Args:
        model: The model, with any context open on it; nothing is read a second time.
        inputs: Arguments of the forward pass.

    Raises:
        ModelError: If the output of a layer, or a logit, is NaN or infinite.
    """
    network: Any = unwrap(model)
    mask = inputs.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    found: list[tuple[int, torch.dtype]] = []

    def rows_of(x: Tensor) -> Tensor:
        return x if real is None or x.dim() != 3 else x[real[:, -x.shape[1] :].to(x.device)]

    def see(layer: int) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            out = next(_tensors(output), None)
            if out is not None and not found and not bool(torch.isfinite(rows_of(out)).all()):
                found.append((layer, out.dtype))

        return after

    hooks = [ModuleHook(module, see(layer), after=True) for layer, module in attention_layers(network).items()]
    output = None
    # an open context may not take this pass
    with contextlib.suppress(UsageError, SpanError), module_hooks(hooks), repeating():
        output = network(**{**inputs, "use_cache": False})
    if found:
        layer, dtype = found[0]
        raise ModelError(
            f"the logits are NaN or infinite, and so is the attention of layer {layer} in {_named(dtype)}; {ADVICE}"
        )
    if output is not None and not bool((rows_of(output.logits).amax(-1) < torch.inf).all()):
        dtype = compute_dtype(network)
        raise ModelError(f"the logits are NaN or infinite in {_named(dtype)}, after the last attention layer; {ADVICE}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
