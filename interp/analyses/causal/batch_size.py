"""How many rows a batch may have, from the memory that is free."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from interp.errors import UsageError

T = TypeVar("T")
TOKENS = {"cpu": 2048, "cuda": 65536}
"""tokens of a batch from which on more rows make nothing faster"""
SHARE = 0.4
"""of the free memory that a batch may take"""


def rows_that_fit(model: Any, tokens: int, vocabulary: int) -> int:
    """Rows of `tokens` tokens that a forward without gradients takes at once, at least one.

    An estimate: the residual stream, the widest activation and a row of logits for each row, in the model's dtype.
    """
    weight = next(model.parameters())
    config = model.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    # a divergence in float64 takes several copies of a row of logits
    each = tokens * (8 * width + 3 * inner) * weight.element_size() + 64 * vocabulary
    fast = TOKENS.get(weight.device.type, TOKENS["cpu"]) // max(tokens, 1)
    return max(1, min(fast, int(SHARE * free(weight.device) / each)))


def free(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def halved(work: Callable[[], T], again: bool) -> T | None:
    """What `work` gives; None where memory ran out and `again` says that less can be tried. UsageError if not."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        # what torch says on a cpu is a RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        if not again:
            raise UsageError("memory ran out: read fewer prompts side by side, with a smaller batch_size.") from error
    # out of the except block, or the traceback would hold what was allocated
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
