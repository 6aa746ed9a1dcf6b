"""The number of rows of a batch, from the memory that is free."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from interp.analyses.memory import free_memory
from interp.errors import UsageError
from interp.hooks.model.config_values import largest_of_layers
from interp.hooks.model.weights import compute_dtype, input_device

T = TypeVar("T")
MAX_TOKENS = {"cpu": 2048, "cuda": 65536}
"""tokens of a batch; more rows than these make nothing faster"""
MEMORY_SHARE = 0.4
"""share of the free memory that a batch may take"""


def rows_that_fit(model: Any, tokens: int, vocabulary: int) -> int:
    """Estimate how many rows a forward pass without gradients takes at once, at least one.

    Each row is counted as the residual stream, the widest activation and one row of logits, in the dtype of the model.

    Args:
        model: A transformers causal language model.
        tokens: Number of tokens of a row.
        vocabulary: Number of entries of the vocabulary.
    """
    device = input_device(model)
    config = model.config.get_text_config()
    width = config.hidden_size
    inner = largest_of_layers(config, "intermediate_size") or 4 * width
    # a divergence in float64 takes several copies of a row of logits
    each = tokens * (8 * width + 3 * inner) * compute_dtype(model).itemsize + 64 * vocabulary
    fast = MAX_TOKENS.get(device.type, MAX_TOKENS["cpu"]) // max(tokens, 1)
    return max(1, min(fast, int(MEMORY_SHARE * free_memory(device) / each)))


def halved(work: Callable[[], T], again: bool) -> T | None:
    """Run `work` and return its result, or None where memory ran out.

    Args:
        work: Function without arguments.
        again: Whether the caller can try again with a smaller batch.

    Raises:
        UsageError: If memory ran out and the caller cannot try again.
    """
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        # on a CPU torch raises a plain RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        if not again:
            raise UsageError("memory ran out with the smallest batch; give a smaller batch_size.") from error
    # out of the except block, or the traceback would hold what was allocated
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
