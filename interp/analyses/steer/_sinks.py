"""Attention sinks of a prompt: keys other than the first whose column mean is high."""

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.hooks.edit.edit_context import EditContext
from interp.hooks.model.heads import HeadLayout, HeadSet

Threshold = float | str
"""a share of attention, or "5/n" for 5 divided by the number of keys that the last rows of each prompt see"""


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
        above = received > limit(threshold, keys_seen(here))[:, None, None].to(received)
        found = above & (here.prompt_keys() & ~here.first_token)[:, None] & here.head_mask[:, None]
        here.note(found)
    # a cache may have dropped its oldest keys since, and has new ones
    found = found[..., here.call.k_start :][..., :keys]
    return torch.nn.functional.pad(found, (0, keys - found.shape[-1]))


def keys_seen(here: EditContext) -> Tensor:
    """Count the keys that a row of each prompt can see: its length, or the window of the layer where that is shorter.

    Args:
        here: The attention call.

    Returns:
        Int `[b]`, the largest count over the rows of the prompt.
    """
    call, lengths = here.call, here.length
    if call.mask is None:
        return lengths if call.window is None else lengths.clamp(max=call.window)
    inside = (here.row_position >= 0) & (here.row_position < lengths[:, None])
    seen = call.visible_ignoring_biases().sum(-1) * inside[:, None]
    return seen.amax((1, 2))


def between(heads: HeadSet, layout: HeadLayout, skip_first: int, skip_last: int) -> HeadSet:
    """The heads that lie in none of the first and last layers.

    Args:
        heads: The heads.
        layout: The heads of the model.
        skip_first: Number of first layers to leave out.
        skip_last: Number of last layers to leave out.

    Returns:
        HeadSet: The other heads.
    """
    return HeadSet(tuple(head for head in heads if skip_first <= head.layer < layout.layers - skip_last))


def check_skipped(**counts: int) -> None:
    """Raise UsageError for a number of layers that is not a whole number from 0."""
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise UsageError(f"{name}={count!r} is not a number of layers; give a whole number, 0 for none.")


def limit(threshold: Threshold, lengths: Tensor) -> Tensor:
    """Float `[b]`: the threshold for rows that see so many keys. Raises UsageError for other text than "5/n"."""
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
