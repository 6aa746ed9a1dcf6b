"""Sums of attention weights over blocks of keys."""

from collections.abc import Sequence

from torch import Tensor


def sum_blocks(weight: Tensor, first: Sequence[int], size: int, m: int) -> Tensor:
    """Sum the weights of each row over blocks of `size` keys, in memory that grows with the rows and the blocks.

    Args:
        weight: [b h r k], weights of rows on a range of keys.
        first: Place in this range at which the first block of each prompt begins; negative where it begins before. Keys
            in front of it count for the first block.
        size: Number of keys of a block.
        m: Number of blocks.

    Returns:
        Tensor: [b h r m].

    Examples:
        >>> import torch
        >>> from interp.kernels.block_sums import sum_blocks
        >>> sum_blocks(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), [-1], 2, 3)
        tensor([[[[1., 5., 4.]]]])
    """
    found = weight.new_zeros(*weight.shape[:3], m)
    for i, begin in enumerate(first):
        part = weight[i, ..., max(0, begin) :]
        place, inside = divmod(max(0, -begin), size)
        # the first block may have begun before this range, and the last one may end after it
        head = min((size - inside) % size, part.shape[-1])
        if head:
            found[i, ..., place] = part[..., :head].sum(-1)
            place += 1
        whole = (part.shape[-1] - head) // size
        stop = head + whole * size
        if whole:
            found[i, ..., place : place + whole] = part[..., head:stop].unflatten(-1, (whole, size)).sum(-1)
        if stop < part.shape[-1]:
            found[i, ..., place + whole] = part[..., stop:].sum(-1)
        if begin > 0 and m:
            found[i, ..., 0] += weight[i, ..., :begin].sum(-1)
    return found
