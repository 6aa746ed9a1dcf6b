"""Selectors that read what the last tokens of the prompt attend to."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.analyses.kv.selector import KeySelector
from interp.analyses.kv.shares import grouped
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext


@dataclass(frozen=True)
class SnapKV(KeySelector):
    """The keys that the last tokens of the prompt attend to most, smoothed along the text.

    rank[b g k] = mean over k' within pool of k, h of g, and the last `window` rows q of pattern[b h q k'].
    Source: Li et al. 2404.14469. Differs: the mean over the rows that see a key and over the heads of a kv head, since
    those share a cache; the window itself is kept as `recent` says. Cannot show: what later tokens would look at.
    """

    recent: int = 16
    window: int = 16
    pool: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(f"window={self.window}, pool={self.pool}: give rows of at least 1, and an odd pool.")

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        received = here.columns(observed(here, self.window)).float()
        return smoothed(grouped(received, here.call.sizes[2]), self.pool, here)


def observed(here: EditContext, window: int) -> Bool[Tensor, "b q"]:
    """The last `window` rows of each prompt. Raises UsageError where some of them are not in the call."""
    length = here.length[:, None]
    rows = (here.row_position >= 0) & (here.row_position < length) & (here.row_position >= length - window)
    if bool((rows.sum(1) < here.length.clamp(max=window)).any()):
        raise UsageError(f"the last {window} tokens of a prompt choose its keys: let it be read in one prefill.")
    return rows


def smoothed(values: Float[Tensor, "b g k"], pool: int, here: EditContext) -> Float[Tensor, "b g k"]:
    """The mean over a window of `pool` neighbours, of those that are tokens of the prompt."""
    length = here.length[:, None]
    real = ((here.key_position >= 0) & (here.key_position < length)).float()[:, None]
    total, count = (torch.nn.functional.avg_pool1d(x, pool, stride=1, padding=pool // 2) for x in (values * real, real))
    return total / count.clamp(min=1e-6)
