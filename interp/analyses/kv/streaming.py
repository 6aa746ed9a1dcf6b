"""StreamingLLM: the first keys and the last."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from interp.analyses.kv.selector import KeySelector
from interp.analyses.registry import selector
from interp.hooks.edit.edit import EditContext


@selector(title="StreamingLLM", order=1)
@dataclass(frozen=True)
class Streaming(KeySelector):
    """The first keys and the last: the cache of StreamingLLM, except for heads with a full cache.

    `kept[b g k] = k < n_sink or k >= q - (round(keep_ratio n) - n_sink)`, where n is the number of tokens of the prompt
    and q the row after it. As a reply grows, its first tokens are evicted too, so that the size of the cache is
    constant. A window has at least `n_recent` keys.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: Number of first keys, which are part of `keep_ratio` and kept before all other keys.
        n_recent: Least number of keys before its own in the window of a later token.
        full_cache_heads: Heads whose kv heads keep everything.

    Examples:
        >>> from interp.analyses.kv import Streaming, selecting
        >>> with selecting(model, Streaming(0.5, n_sink=1, n_recent=2), prompts):
        ...     tokens = model.generate(**prompts.tensors(), max_new_tokens=2, do_sample=False)
        >>> tokens.shape
        torch.Size([2, 19])

    Source:
        Xiao et al. 2309.17453.

    Differs:
        The prompt is read with all keys. Keys keep their positions, where the released code renumbers them.

    Limits:
        Does not show the behaviour of a model that was trained on such windows.
    """

    @property
    def rolls(self) -> bool:
        return True

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        """Later keys before earlier ones."""
        _, _, g, _, _ = here.call.sizes
        return here.key_position.clamp(min=0).float()[:, None].expand(-1, g, -1)
