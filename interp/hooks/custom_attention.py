"""Attention functions that a user registered: they are read and edited where they compute what interp computes."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import ModelError
from interp.hooks.model import attention_names
from interp.hooks.site import Site
from interp.kernels.select import select

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""largest difference of the outputs relative to their norm; other dtypes have `LOW_PRECISION`"""
LOW_PRECISION = 3e-2


def is_custom(config: Any) -> bool:
    """Whether the attention function that a config names was registered by somebody else than transformers.

    The function decides, not its name: a user may register another one as "sdpa".

    Args:
        config: The config of an attention module.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS.get(attention_names.original_implementation(config))
    while isinstance(function, partial):
        function = function.func
    # without a function, the eager one of the model's own module runs
    return function is not None and not getattr(function, "__module__", "").startswith("transformers.")


def check_same(module: nn.Module, site: Site, output: Tensor) -> None:
    """Check that a custom attention function computes softmax attention of its arguments, as interp does.

    Args:
        module: The attention module.
        site: Its call, before any edit.
        output: What the custom function returned, `[b q h d]`.

    Raises:
        ModelError: If the output of an engine differs.
    """
    call = site.reading(site.call)
    expected = select(call, (), None).engine(call).written.transpose(1, 2)
    difference = (output - expected).float()
    size = expected.float()
    if call.row_live is not None:
        # queries that are padding may hold anything
        live = call.row_live[:, :, None, None]
        difference, size = difference.where(live, 0.0), size.where(live, 0.0)
    relative = float(difference.norm() / size.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not relative <= TOLERANCE.get(output.dtype, LOW_PRECISION):
        raise ModelError(
            f"the attention implementation {attention_names.original_implementation(module.config)!r} of "
            f"{type(module).__name__} does not compute the softmax attention of its arguments (its output differs by "
            f"{relative:.0e} of the norm), so interp can neither read nor edit it; load the model with "
            "attn_implementation='sdpa'."
        )
