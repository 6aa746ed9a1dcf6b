"""SnapKV: the keys that the last tokens of the prompt attend to."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from interp.analyses.kv._observation import observed_rows, smoothed
from interp.analyses.kv._shares import grouped
from interp.analyses.kv.selector import KeySelector
from interp.analyses.registry import selector
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext


@selector(title="SnapKV", order=2)
@dataclass(frozen=True)
class SnapKV(KeySelector):
    """Keep the keys that the last tokens of the prompt attend to most, by attention averaged over neighbouring keys.

    Each kv head g keeps its own keys, and its query heads share them. `rank[b g k]` is the mean of `pattern[b h q k']`
    over the query heads h of g, the last `window` rows q of the prompt, and the `kernel_size` keys k' centred on k.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: Number of first keys, which are part of `keep_ratio` and kept before all other keys.
        n_recent: Number of last keys, which are part of `keep_ratio` and kept before the ranked keys.
        full_cache_heads: Heads whose kv heads keep everything.
        window: Number of last rows of the prompt whose attention ranks the keys.
        kernel_size: Width, in keys, of the averaging window centred on each key, itself included; an odd number.

    Raises:
        UsageError: If a setting is out of range, or, while the model runs, if the prompt is read in chunks.

    Examples:
        >>> from interp.analyses.kv import SnapKV, selecting
        >>> with selecting(model, SnapKV(0.5, n_sink=1, n_recent=2, window=4), prompts):
        ...     tokens = model.generate(**prompts.tensors(), max_new_tokens=2, do_sample=False)

    Source:
        Li et al. 2404.14469.

    Differs:
        The released code ranks keys for each query head and always keeps the keys of the last `window` rows. Here the
        query heads of a kv head have one ranking, because they share a cache, and `n_recent` sets how many last keys
        are kept. Other keys of the window are ranked by the mean over the rows that see them.

    Limits:
        Does not show which keys later tokens would attend to.
    """

    n_recent: int = 16
    window: int = 16
    kernel_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UsageError(
                f"window={self.window}, kernel_size={self.kernel_size}; give a window of at least 1 row, and an odd "
                "kernel_size."
            )

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        """Smoothed attention from the last rows."""
        received = here.columns(observed_rows(here, self.window)).float()
        return smoothed(grouped(received, here.call.sizes[2]), self.kernel_size, here)
