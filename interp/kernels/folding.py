"""Biases on logits as further dimensions of q and k, so that attention with biases costs as much as without."""

from dataclasses import replace

import torch
from torch import Tensor

from interp.kernels.contract import Call

MIN_ROWS = 16
"""Number of rows from which it pays to copy q and k."""
MAX_DIMENSIONS = 64
"""Largest number of dimensions that are added to q and k."""
MAX_FOLDED_BIAS = 1e4
"""Largest bias that is folded. Larger ones hide keys or take all the attention, and stay biases."""


def fold_biases(call: Call) -> Call:
    """Return a call with equal logits, whose `key_bias` and `row_coef` are dimensions of q and k.

    `q k + bias = [q, u] [k, m]`, with the coefficients u of a row and the membership m of a key. Heads that share a kv
    head have dimensions of their own where their biases differ.

    Args:
        call: The attention call.

    Returns:
        Call: The call with wider q and k, in the dtype of the statistics; the same call where biases hide keys, follow
            a soft-cap, need more than MAX_DIMENSIONS dimensions, or concern few rows.
    """
    if (call.key_bias is None and call.row_coef is None) or call.softcap is not None or call.sizes[3] < MIN_ROWS:
        return call
    b, h, g, n = call.sizes[:4]
    each = h // g
    parts: list[tuple[Tensor, Tensor]] = []
    """[b 1|h q s] coefficients and [b 1|h k s] memberships of each bias."""
    if call.key_bias is not None:
        bias = call.key_bias.to(call.dtype).expand(b, -1, -1)[..., None]
        parts.append((torch.ones(b, 1, n, 1, dtype=call.dtype, device=call.q.device), bias))
    if call.row_coef is not None:
        group, coef = call.group_of_key, call.row_coef.to(call.dtype).expand(b, -1, -1, -1)
        number = torch.arange(1, coef.shape[-1] + 1, device=group.device)
        parts.append((coef, (group[..., None] == number).to(call.dtype)))
    width = sum(member.shape[-1] * (1 if member.shape[1] == 1 else each) for _, member in parts)
    bounded = (call.key_bias, call.row_coef)
    if width > MAX_DIMENSIONS or any(x is not None and bool((~(x.abs() <= MAX_FOLDED_BIAS)).any()) for x in bounded):
        return call
    scale = torch.full((), call.scale, dtype=call.dtype, device=call.q.device)
    q, k = call.q.to(call.dtype), call.k.to(call.dtype)
    if call.logit_scale is not None:
        q = q * call.logit_scale.to(call.dtype).expand(b, h)[:, :, None, None]
    more_q, more_k = zip(*(_dimensions(coef, member, h, g) for coef, member in parts), strict=True)
    q, k = torch.cat([q, *(x / scale for x in more_q)], -1), torch.cat([k, *more_k], -1)
    return replace(call, q=q, k=k, key_bias=None, row_coef=None, key_group=None, logit_scale=None)


def _dimensions(coef: Tensor, member: Tensor, h: int, g: int) -> tuple[Tensor, Tensor]:
    """Dimensions [b h q r] of q and [b g k r] of k for coefficients [b 1|h q s] and memberships [b 1|h k s]."""
    b, _, n = coef.shape[:3]
    coef = coef.expand(-1, h, -1, -1)
    if member.shape[1] == 1:
        return coef, member.expand(-1, g, -1, -1)
    # head i of its kv head reads the memberships in place i, and zeros in the others
    own = torch.eye(h // g, dtype=coef.dtype, device=coef.device)[None, None, :, None, :, None]
    places = coef.unflatten(1, (g, h // g))[..., None, :] * own
    return places.reshape(b, h, n, -1), member.unflatten(1, (g, h // g)).movedim(2, 3).flatten(3)
