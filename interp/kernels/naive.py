"""Reference implementation of every output in plain torch, from the whole n x n pattern.

It accepts any dtype up to float64, and all engines are tested against it.
"""

from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from interp.kernels.contract import (
    At,
    Blocks,
    Call,
    Columns,
    Entropy,
    Lse,
    Mass,
    Request,
    Result,
    Rows,
    TopKeys,
    block_grid,
)
from interp.kernels.padding import without_padding


def logits(call: Call) -> Tensor:
    """Compute the logits that enter the softmax.

    Args:
        call: The attention call.

    Returns:
        Tensor: Float [b h q k], -inf for keys that are not visible.
    """
    b, h, g, _, _ = call.sizes
    k = call.k.to(call.dtype).repeat_interleave(h // g, 1)
    score = call.q.to(call.dtype) @ k.transpose(-1, -2) * call.scale
    if call.logit_scale is not None:
        score = score * call.logit_scale.to(call.dtype).expand(b, h)[:, :, None, None]
    if call.softcap is not None:
        score = call.softcap * torch.tanh(score / call.softcap)
    return (score + call.bias()).masked_fill(~call.visible(), -torch.inf)


def lse(call: Call, score: Tensor) -> Tensor:
    """Compute the natural log of the softmax denominator, learned sink included.

    Args:
        call: The attention call.
        score: Float [b h q k], the logits of the call.

    Returns:
        Tensor: Float [b h q], -inf for rows that see no key.
    """
    total = torch.logsumexp(score, -1)
    if call.sinks is not None:
        total = torch.logaddexp(total, call.sinks.to(total.dtype)[None, :, None])
    # a row that sees no key has no denominator, with or without a learned sink
    return total.masked_fill(~call.visible().any(-1).expand(total.shape), -torch.inf)


def pattern(call: Call) -> Tensor:
    """Compute the attention pattern, `exp(logits - lse)`.

    Args:
        call: The attention call.

    Returns:
        Tensor: Float [b h q k]; a row that sees no key is zero.
    """
    score = logits(call)
    total = lse(call, score)[..., None]
    # only a row that sees no key is zero: a NaN in any other row is a fault of the model, and stays
    return torch.exp(score - total).masked_fill(total == -torch.inf, 0.0)


def attend(call: Call, requests: tuple[Request, ...] = (), queries: Tensor | None = None, out: bool = True) -> Result:
    """Compute attention and every reduction by its definition, in O(n^2) memory.

    `pattern[b h q k] = exp(logits - lse)` and `out[b h q d] = sum over k of pattern v`.

    Args:
        call: The attention call.
        requests: The reductions to compute.
        queries: Int [r], indices of the rows that the reductions read; None for all.
        out: Whether to compute the output.

    Returns:
        Result: The output, and one value per request.

    Examples:
        >>> from interp.kernels import naive
        >>> from interp.kernels.contract import Call, TopKeys
        >>> q = torch.eye(3)[None, None] * 9
        >>> keys, probabilities = naive.attend(Call(q, q, q, scale=1.0), (TopKeys(1),)).values[0]
        >>> keys[..., 0]
        tensor([[[0, 1, 2]]])
    """
    call = without_padding(call)
    p = pattern(call)
    h, g = call.sizes[1:3]
    v = call.v.to(p.dtype).repeat_interleave(h // g, 1)
    index = torch.arange(p.shape[2], device=p.device) if queries is None else queries
    values = tuple(reduce(request, call, p, index) for request in requests)
    return Result((p @ v).to(call.v.dtype) if out else None, values)


def weighted_by_value(call: Call, p: Tensor) -> Tensor:
    """Weight attention by the norms of the values.

    `weighted[b h q k] = p |v| / sum over k of p |v|`

    Args:
        call: The attention call.
        p: Float [b h q k], the pattern of the call.

    Returns:
        Tensor: Float [b h q k].
    """
    h, g = call.sizes[1:3]
    weighted = p * call.v.to(p.dtype).norm(dim=-1).repeat_interleave(h // g, 1)[:, :, None]
    return weighted / weighted.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)


@singledispatch
def reduce(request: Request, call: Call, p: Tensor, index: Tensor) -> Any:
    """Compute the value of one request from the whole pattern.

    Args:
        request: The reduction.
        call: The attention call.
        p: Float [b h q k], the pattern of the call.
        index: Int [r], indices of the rows that the reduction reads.

    Returns:
        Any: The value, as the class of the request describes it.
    """
    raise NotImplementedError(type(request).__name__)


@reduce.register
def _(request: Lse, call: Call, p: Tensor, index: Tensor) -> Tensor:
    return lse(call, logits(call))[:, :, index]


@reduce.register
def _(request: Entropy, call: Call, p: Tensor, index: Tensor) -> Tensor:
    # over keys alone; next to a learned sink far above, the weights of keys would be 0
    over_keys = p if call.sinks is None else pattern(replace(call, sinks=None))
    return torch.special.entr(over_keys[:, :, index]).sum(-1)


@reduce.register
def _(request: TopKeys, call: Call, p: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    rows, seen = p[:, :, index], call.visible().expand(p.shape)[:, :, index]
    # a stable descending sort keeps the lowest column first among equals
    score = logits(call)[:, :, index]
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., : request.k]
    found = seen.gather(-1, order)
    keys = torch.where(found, order + call.k_start, -1)
    probs = rows.gather(-1, order) * found
    short = request.k - order.shape[-1]
    pad = torch.nn.functional.pad
    return (pad(keys, (0, short), value=-1), pad(probs, (0, short))) if short > 0 else (keys, probs)


@reduce.register
def _(request: Mass, call: Call, p: Tensor, index: Tensor) -> Tensor:
    rows = (weighted_by_value(call, p) if request.by_value else p)[:, :, index]
    sets = request.sets if request.sets.dim() == 4 else request.sets[:, None]
    return rows @ sets.to(p.dtype).transpose(-1, -2)


@reduce.register
def _(request: At, call: Call, p: Tensor, index: Tensor) -> Tensor:
    rows = (weighted_by_value(call, p) if request.by_value else p)[:, :, index]
    if not p.shape[-1]:
        return rows.new_zeros(*rows.shape[:3], *([] if request.total else [request.keys.shape[-1]]))
    local = request.keys - call.k_start
    there = (local >= 0) & (local < p.shape[-1]) & (request.keys >= 0)
    where = local.clamp(0, p.shape[-1] - 1)[:, None].expand(-1, p.shape[1], -1, -1)
    found = rows.gather(-1, where) * there[:, None]
    return found.sum(-1) if request.total else found


@reduce.register
def _(request: Columns, call: Call, p: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    rows = (weighted_by_value(call, p) if request.by_value else p)[:, :, index]
    b = p.shape[0]
    weights = torch.ones(b, p.shape[2], dtype=p.dtype, device=p.device)
    if request.weights is not None:
        weights = request.weights.to(p.dtype).expand(b, -1)
    weights = weights[:, None, index, None]
    seen = (call.visible()[:, :, index] * weights).sum(2).expand(b, p.shape[1], -1)
    # one more row of zeros, so that the maximum over no rows is 0
    weighted = torch.nn.functional.pad(rows * weights, (0, 0, 0, 1))
    return (weighted.sum(2) if request.stat == "sum" else weighted.amax(2)), seen


@reduce.register
def _(request: Rows, call: Call, p: Tensor, index: Tensor) -> Tensor:
    return (logits(call) if request.logits else p)[:, :, request.queries]


@reduce.register
def _(request: Blocks, call: Call, p: Tensor, index: Tensor) -> tuple[int, Tensor, Tensor]:
    start, n, m, row_block, key_block = block_grid(call, request, index)
    row_in = torch.nn.functional.one_hot(row_block, n).to(p.dtype)
    key_in = torch.nn.functional.one_hot(key_block, m).to(p.dtype)
    sums = torch.einsum("bhrk,brn,bkm->bhnm", p[:, :, index], row_in, key_in)
    live = call.visible().any(-1).any(1).expand(p.shape[0], -1)[:, index]
    return start, sums, (live.to(p.dtype)[..., None] * row_in).sum(1)
