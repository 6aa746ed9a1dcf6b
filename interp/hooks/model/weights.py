"""Where the weights of a model are, in which dtype they compute, and the weight of a projection in any form."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.hooks.model.layers import unwrap

__all__ = ["acting_weight", "compute_dtype", "input_device", "is_plain"]


def input_device(model: nn.Module) -> torch.device:
    """The device that a model takes its inputs on, also where accelerate keeps the weights elsewhere.

    Args:
        model: A transformers causal language model, a compiled one, or a TransformerBridge over one.
    """
    network = unwrap(model)
    for module in network.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return _device(hook.execution_device)
    return next(network.parameters()).device


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the activations of a model: that of an open autocast, or of its first floating-point weight.

    Args:
        model: As in `input_device`.
    """
    kind = input_device(model).type
    # a model without values is on the device "meta", which has no autocast
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    network = unwrap(model)
    return next((weight.dtype for weight in network.parameters() if weight.is_floating_point()), torch.float32)


def is_plain(projection: nn.Module) -> bool:
    """Whether a projection is a linear map whose weight is stored as it acts, and in memory.

    Args:
        projection: A module.
    """
    from transformers.pytorch_utils import Conv1D

    weight: Any = getattr(projection, "weight", None)
    return (
        type(projection) in (nn.Linear, Conv1D)
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.device.type != "meta"
    )


def acting_weight(projection: Any, like: Tensor) -> Float[Tensor, "i o"]:
    """The weight that a projection acts with, whatever form it is stored in.

    `weight[i o] = projection(e_i)[o] - projection(0)[o]`, which includes adapters, and dequantises packed weights. The
    weight of a plain linear map is returned itself.

    Args:
        projection: A linear map: `nn.Linear`, `Conv1D`, or one of a library for adapters, quantisation or offloading.
        like: A tensor with the dtype and device of the inputs.

    Returns:
        Tensor: The weight, without gradients unless it is stored as it acts.

    Examples:
        >>> import torch
        >>> from interp.hooks.model.weights import acting_weight
        >>> acting_weight(torch.nn.Linear(2, 3), torch.zeros(1)).shape
        torch.Size([2, 3])
    """
    if is_plain(projection):
        # Linear stores [out, in], Conv1D [in, out]
        return projection.weight.T if isinstance(projection, nn.Linear) else projection.weight
    width = getattr(projection, "in_features", None) or projection.nx
    with torch.no_grad():
        rows = torch.eye(width, dtype=like.dtype, device=like.device)
        return projection(rows) - projection(torch.zeros_like(rows[:1]))


def _hooks(module: nn.Module) -> list[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", None) or [hook])


def _device(found: Any) -> torch.device:
    return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)
