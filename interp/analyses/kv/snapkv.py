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
    """The keys that get most attention from the last tokens of the prompt, smoothed along the text.

    `rank[b g k]` is the mean of `pattern[b h q k']` over the last `window` rows q, the query heads h of g, and the keys
    k' within a window of `kernel_size` around k.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: First keys that are kept.
        n_recent: Last keys that are kept.
        full_cache_heads: Heads whose kv heads keep everything.
        window: Number of last rows that rank the keys.
        kernel_size: Width of the smoothing, an odd number.

    Raises:
        UsageError: If a setting is out of range, or, while the model runs, if the prompt is read in chunks.

    Examples:
        >>> from interp.analyses.kv import SnapKV, selecting
        >>> with selecting(model, SnapKV(0.5, n_sink=1, n_recent=2, window=4), prompts):
        ...     tokens = model.generate(**prompts.tensors(), max_new_tokens=2, do_sample=False)

    Source:
        Li et al. 2404.14469.

    Differs:
        The mean is over the rows that see a key and over the heads of a kv head, since those share a cache. `n_recent`
        says how much of the window itself is kept.

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
