"""Padding of an attention call: whatever its tensors hold there, no result depends on it."""

from dataclasses import replace

import torch
from torch import Tensor

from interp.kernels.contract import Call


def without_padding(call: Call) -> Call:
    """Return the same call with zeros in place of queries, keys and values that are padding.

    A weight of 0 times a value of NaN is NaN, so padding that is not finite would reach every row. Padding is known
    from `live` and `row_live`, and with a mask of four axes from the keys that no query sees.

    Args:
        call: The attention call.

    Returns:
        Call: The call, whose results are those of a call with finite padding.
    """
    q, k, v = call.q, call.k, call.v
    dead = None if call.live is None else ~call.live[:, None]
    if call.mask is not None and not _finite(k, v):
        unseen = ~call.visible_ignoring_biases().any(2).any(1, keepdim=True)
        dead = unseen if dead is None else dead | unseen
    if dead is not None:
        k, v = (x.masked_fill(dead[..., None], 0.0) for x in (k, v))
    if call.row_live is not None:
        q = q.masked_fill(~call.row_live[:, None, :, None], 0.0)
    return replace(call, q=q, k=k, v=v)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors)
