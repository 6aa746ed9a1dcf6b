"""SnapKV: the keys that the last tokens of the prompt attend to."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from interp.analyses.kv._observation import Pooling, before_window, observed_rows, pooled
from interp.analyses.kv._shares import grouped
from interp.analyses.kv.selector import KeySelector
from interp.analyses.registry import selector
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext


@selector(title="SnapKV", order=2)
@dataclass(frozen=True)
class SnapKV(KeySelector):
    """Keep the keys that the last tokens of the prompt attend to most, by attention pooled over neighbouring keys.

    Each kv head g keeps its own keys, and its query heads share them. The last `window` keys are always kept. Of the
    keys before them, `rank[b g k]` is the mean of `pattern[b h q k']` over the query heads h of g, the last `window`
    rows q of the prompt, and the `kernel_size` keys k' centred on k. Keys outside of this range count as 0.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: Number of first keys, which are part of `keep_ratio` and kept before all other keys.
        n_recent: Number of last keys, which are part of `keep_ratio` and kept before the ranked keys; at least `window`
            are kept.
        full_cache_heads: Heads whose kv heads keep everything.
        window: Number of last rows of the prompt whose attention ranks the keys.
        kernel_size: Width, in keys, of the pooling window centred on each key, itself included; an odd number.
        pooling: "mean" of the neighbours, or their "max".

    Raises:
        UsageError: If a setting is out of range, or, while the model runs, if the prompt is read in chunks.

    Examples:
        >>> from interp.analyses.kv import SnapKV, selecting
        >>> with selecting(model, SnapKV(0.5, n_sink=1, n_recent=2, window=4), prompts):
        ...     tokens = model.generate(**prompts.tensors(), max_new_tokens=2, do_sample=False)

    Source:
        Li et al. 2404.14469.

    Differs:
        The released code ranks keys for each query head. Here the query heads of a kv head have one ranking, because
        they share a cache. The budget is a share of the prompt, where the released code keeps a fixed number of keys.

    Limits:
        Does not show which keys later tokens would attend to.
    """

    n_sink: int = 0
    n_recent: int = 32
    window: int = 32
    kernel_size: int = 5
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UsageError(
                f"window={self.window}, kernel_size={self.kernel_size}; give a window of at least 1 row, and an odd "
                "kernel_size."
            )
        if self.pooling not in ("mean", "max"):
            raise UsageError(f"unknown pooling {self.pooling!r}; choose from 'mean', 'max'.")

    @property
    def forced(self) -> tuple[int, int]:
        return self.n_sink, max(self.n_recent, self.window)

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        """Pooled attention from the last rows."""
        return self.pooled(here, grouped(self.observed(here), here.call.sizes[2]))

    def observed(self, here: EditContext) -> Float[Tensor, "b h k"]:
        """Mean attention from the last `window` rows; warns where the kept keys are all among the forced ones."""
        if bool((self.keep_ratio * here.length <= sum(self.forced)).any()):
            first, last = self.forced
            here.steering.warn(
                here.number,
                f"{type(self).__name__} keeps {self.keep_ratio:g} of a prompt of {int(here.length.min())} tokens, but "
                f"the first {first} and last {last} keys come before all others, so no key is ranked; give a larger "
                "keep_ratio, a longer prompt, or a smaller window and n_recent.",
            )
        return here.columns(observed_rows(here, self.window), all_rows=True).float()

    def pooled(self, here: EditContext, values: Float[Tensor, "b g k"]) -> Float[Tensor, "b g k"]:
        """Pool the values of the keys before the window over their neighbours.

        Args:
            here: The attention call of the prompt.
            values: A value of each key.

        Returns:
            The pooled values; 0 in the window.
        """
        return pooled(values, before_window(here, self.window), self.kernel_size, self.pooling)
