"""Attention of the last tokens of a prompt, by which several selectors rank its keys."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext


def observed_rows(here: EditContext, window: int) -> Bool[Tensor, "b q"]:
    """The last `window` rows of each prompt. Raises UsageError where some of them are not in the call."""
    length = here.length[:, None]
    rows = (here.row_position >= 0) & (here.row_position < length) & (here.row_position >= length - window)
    if bool((rows.sum(1) < here.length.clamp(max=window)).any()):
        raise UsageError(
            f"the last {window} tokens of a prompt choose its keys, but it is read in chunks; read it in one prefill."
        )
    return rows


def smoothed(values: Float[Tensor, "b g k"], kernel_size: int, here: EditContext) -> Float[Tensor, "b g k"]:
    """The mean over `kernel_size` neighbours, of those that are tokens of the prompt."""
    length = here.length[:, None]
    real = ((here.key_position >= 0) & (here.key_position < length)).float()[:, None]
    total, count = (
        torch.nn.functional.avg_pool1d(x, kernel_size, stride=1, padding=kernel_size // 2)
        for x in (values * real, real)
    )
    return total / count.clamp(min=1e-6)
