"""Attention of the last tokens of a prompt, by which several selectors rank its keys."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext

Pooling = Literal["mean", "max"]


def observed_rows(here: EditContext, window: int) -> Bool[Tensor, "b q"]:
    """The last `window` rows of each prompt. Raises UsageError where some of them are not in the call."""
    length = here.length[:, None]
    rows = (here.row_position >= 0) & (here.row_position < length) & (here.row_position >= length - window)
    if bool((rows.sum(1) < here.length.clamp(max=window)).any()):
        raise UsageError(
            f"the last {window} tokens of a prompt choose its keys, but it is read in chunks; read it in one prefill."
        )
    return rows


def pooled(
    values: Float[Tensor, "b g k"], real: Bool[Tensor, "b k"], kernel_size: int, pooling: Pooling
) -> Float[Tensor, "b g k"]:
    """Pool values over neighbouring keys, as the released code of SnapKV does.

    Args:
        values: The values.
        real: Keys that have values; the others count as 0, and get 0.
        kernel_size: Number of neighbours, the key itself included. A mean divides by it at the ends too.
        pooling: "mean" or "max".

    Returns:
        The pooled values.
    """
    pool = torch.nn.functional.avg_pool1d if pooling == "mean" else torch.nn.functional.max_pool1d
    inside = real[:, None]
    return pool(values.masked_fill(~inside, 0.0), kernel_size, stride=1, padding=kernel_size // 2) * inside


def before_window(here: EditContext, window: int) -> Bool[Tensor, "b k"]:
    """The keys of each prompt before its last `window` tokens."""
    position = here.key_position
    return (position >= 0) & (position < here.length[:, None] - window)
