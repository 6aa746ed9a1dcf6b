"""Attention sinks of a prompt: keys other than the first whose column mean is high."""

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.hooks.edit.edit_context import EditContext

Threshold = float | str
"""a share of attention, or "5/n" for 5 divided by the length of each prompt"""


def sinks(here: EditContext, threshold: Threshold) -> Tensor:
    """Find the sinks of each head: keys k > 0 of the prompt whose mean attention is above the threshold.

    The mean of `pattern[b h q k]` is over the rows q that see the key. The sinks are found once, on the prompt, and
    kept for the decode steps.

    Args:
        here: The attention call.
        threshold: A share of attention, or "5/n".

    Returns:
        Bool `[b h k]`, False for heads that the edit does not name.

    Raises:
        UsageError: Where the prompt is read in several chunks.
    """
    keys = here.call.sizes[4]
    found = here.recall()
    if found is None or here.call.q_start <= here.call.k_start:
        lengths = here.length
        position = here.row_position
        if here.call.q.shape[2] < int(lengths.max()):
            raise UsageError("sinks are found on the whole prompt, but it is read in chunks; read it in one prefill.")
        received = here.columns((position >= 0) & (position < lengths[:, None]))
        above = received > limit(threshold, lengths)[:, None, None].to(received)
        found = above & (here.prompt_keys() & ~here.first_token)[:, None] & here.head_mask[:, None]
        here.note(found)
    # a cache may have dropped its oldest keys since, and has new ones
    found = found[..., here.call.k_start :][..., :keys]
    return torch.nn.functional.pad(found, (0, keys - found.shape[-1]))


def limit(threshold: Threshold, lengths: Tensor) -> Tensor:
    """Float `[b]`: the threshold for prompts of these lengths. Raises UsageError for anything but a number or "5/n"."""
    if isinstance(threshold, str):
        number, _, n = threshold.partition("/")
        try:
            if n.strip() != "n":
                raise ValueError
            return float(number) / lengths.float()
        except ValueError:
            raise UsageError(
                f"threshold={threshold!r} cannot be read; give a number, or a text such as '5/n'."
            ) from None
    return torch.full_like(lengths, threshold, dtype=torch.float32)
