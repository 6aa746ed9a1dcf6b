"""Attention without reductions by torch's scaled_dot_product_attention."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from interp.kernels.contract import Call


def suits_sdpa(call: Call, size: int) -> bool:
    """Return whether torch's attention serves a call: where it is exact, and quicker than blocks of rows.

    Args:
        call: The attention call.
        size: Number of scores of a block.

    Returns:
        bool: True for plain causal calls, for calls of one block, and where gradients may flow.
    """
    if call.softcap is not None or call.sinks is not None or not call.q.dtype == call.v.dtype == call.dtype:
        return False
    b, h, _, n, n_keys = call.sizes
    return torch.is_grad_enabled() or b * h * n * n_keys <= size or is_plain_causal(call)


def is_plain_causal(call: Call) -> bool:
    """Return whether every row sees all keys up to its own, and no bias or mask is added to the logits.

    Args:
        call: The attention call.

    Returns:
        bool: Whether torch's `is_causal` means the same.
    """
    limits = call.live, call.row_live, call.mask, call.row_columns
    if call.adds_bias or not call.causal or any(x is not None for x in limits):
        return False
    keys = call.k.shape[2]
    return call.q_start == call.k_start and call.q.shape[2] == keys and (call.window or keys) >= keys


def attend_by_sdpa(call: Call, size: int) -> Tensor:
    """Compute the output of a call, with its biases as a mask, in blocks of rows.

    Args:
        call: The attention call.
        size: Number of scores of a block.

    Returns:
        Tensor: [b h q e].
    """
    b, h, g, n, n_keys = call.sizes
    q = call.q if call.logit_scale is None else call.q * call.logit_scale.to(call.dtype).expand(b, h)[:, :, None, None]
    # torch's quick attention wants q, k and v of one width
    wide = max(q.shape[-1], call.v.shape[-1])
    q, k, v = (x if x.shape[-1] == wide else pad(x, (0, wide - x.shape[-1])) for x in (q, call.k, call.v))
    settings: dict[str, Any] = {"scale": call.scale, "enable_gqa": g != h}
    if is_plain_causal(call) and not torch.is_grad_enabled():
        return scaled_dot_product_attention(q, k, v, is_causal=True, **settings)[..., : call.v.shape[-1]]
    outs = []
    for rows in torch.arange(n).split(max(1, size // max(1, b * h * n_keys))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        mask = call.bias(part).to(call.dtype) if call.adds_bias else call.q.new_zeros(1, 1, 1, 1)
        if not call.sees_all_keys:
            mask = torch.where(call.visible_ignoring_biases(part), mask, -torch.inf)
        dead = (mask == -torch.inf).all(-1, keepdim=True)
        blind = bool(dead.any())
        if blind:
            # a row that sees no key would be NaN
            mask = mask.masked_fill(dead, 0.0)
        mask = mask.expand(b, h, len(rows), n_keys)
        out = scaled_dot_product_attention(q[:, :, part], k, v, attn_mask=mask, **settings)
        outs.append(out.masked_fill(dead, 0.0) if blind else out)
    whole = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    return whole[..., : call.v.shape[-1]]
