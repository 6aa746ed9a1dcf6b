"""Streaming attention: a query sees the first `sink` keys and the last `recent` ones, in memory O(n (sink + recent)).

Plain torch, differentiable. `stream` attends to those keys; `beyond` is the call of all the others, so that the two
share out what a query sees.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from interp.errors import UsageError
from interp.kernels.contract import Call

LEAST = 32
"""queries of a block, so that few recent keys do not make many small products"""
HELD = 1 << 26
"""logits made at once, in numbers: a longer call is cut into runs of queries"""


def stream(call: Call, sink: int, recent: int, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of each query to the first `sink` and the last `recent` keys of those that the call lets it see.

    Key j is seen by query i where the call lets it and j - first < sink or 0 <= i - j < recent: (out [b h q e] in the
    dtype of v, lse [b h q] in nats with a learned sink included); 0 and -inf where nothing is seen.
    first: Int [b] column of each prompt's first token; by default the first live column.
    Blocks of queries meet the blocks of keys that they reach, and the sink keys: [b h q sink + recent + block] logits,
    at most HELD at a time, and all of them in a backward pass. Gradients flow into q, k and v.
    Raises UsageError for a call with edits, or whose rows do not follow each other.
    """
    _check(call, sink, recent)
    b, h, g, n, m = call.sizes
    if 0 in (b, h, n, m):
        return call.v.new_zeros(b, h, n, call.v.shape[-1]), call.q.new_full((b, h, n), -torch.inf, dtype=call.dtype)
    start = _first(call, first) - call.k_start
    size = max(LEAST, min(recent, m))
    back = -(-(recent - 1) // size)
    most = max(size, HELD // (b * h * (sink + (back + 1) * size)))
    if n > most:
        runs = [_run(call, slice(i, min(n, i + most))) for i in range(0, n, most)]
        outs, lses = zip(*(stream(run, sink, recent, start + call.k_start) for run in runs), strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)
    begin = call.q_start - call.k_start
    # keys that no query can reach are left out of the band
    low = max(0, begin - recent + 1)
    ahead = begin - low
    blocks = -(-(ahead + n) // size)
    q = pad(call.q.to(call.dtype) * call.scale, (0, 0, ahead, blocks * size - ahead - n))
    q = q.view(b, g, h // g, blocks, size, -1).transpose(2, 3).reshape(b, g, blocks, h // g * size, -1)

    near_k, near_v = (_near(x[:, :, low : begin + n].to(call.dtype), blocks, size, back) for x in (call.k, call.v))
    column = (start[:, None] + torch.arange(sink, device=start.device)).clamp(0, m - 1)
    far_k, far_v = (_gathered(x.to(call.dtype), column) for x in (call.k, call.v))
    score = torch.cat([q @ near_k.mT, q @ far_k[:, :, None].mT], -1).unflatten(-2, (h // g, size))
    if call.softcap is not None:
        score = torch.tanh(score / call.softcap) * call.softcap
    seen, bias = _seen(call, start, column, sink, recent, low, blocks, size, back)
    if bias is not None:
        score = score + bias
    # a large finite number: the gradient of -inf - -inf is nan
    hidden = torch.finfo(call.dtype).min / 4
    score = score.masked_fill(~seen, hidden)
    peak = score.detach().amax(-1, keepdim=True)
    learned = None
    if call.sinks is not None:
        learned = call.sinks.to(call.dtype).view(1, g, 1, h // g, 1, 1)
        peak = torch.maximum(peak, learned.detach())
    weight = torch.exp(score - peak) * seen
    total = weight.sum(-1, keepdim=True)
    total = total if learned is None else total + torch.exp(learned - peak)
    dead = ~seen.any(-1, keepdim=True)
    total = total.masked_fill(dead, 1.0)
    weight = weight.flatten(-3, -2)
    wide = near_v.shape[-2]
    out = (weight[..., :wide] @ near_v + weight[..., wide:] @ far_v[:, :, None]).unflatten(-2, (h // g, size)) / total
    lse = (peak + total.log()).masked_fill(dead, -torch.inf)
    out, lse = (x.transpose(2, 3).reshape(b, h, blocks * size, -1)[:, :, ahead : ahead + n] for x in (out, lse))
    return out.to(call.v.dtype), lse[..., 0]


def beyond(call: Call, sink: int, recent: int, first: Tensor | None = None) -> Call:
    """The call on the keys that `stream` leaves out: a query stands `recent` columns back, the sink keys are dead.

    Any engine serves it; a learned sink is left to `stream`, so that the two denominators add up to the call's own.
    """
    _check(call, sink, recent)
    column = torch.arange(call.k_start, call.k_start + call.k.shape[2], device=call.q.device)
    live = column >= _first(call, first)[:, None] + sink
    window = None if call.window is None else call.window - recent
    if window is not None and window <= 0:
        live, window = torch.zeros_like(live), None
    return replace(
        call,
        causal=True,
        row_columns=call.rows - recent,
        live=live if call.live is None else live & call.live,
        window=window,
        sinks=None,
    )


def _check(call: Call, sink: int, recent: int) -> None:
    if sink < 0 or recent < 1:
        raise UsageError(f"sink={sink}, recent={recent}: give a number of first keys, 0 or more, and a last one.")
    if call.edited or call.row_columns is not None:
        raise UsageError("streaming attention takes a call as the model makes it: leave edits and choices of rows out.")


def _first(call: Call, first: Tensor | None) -> Tensor:
    if first is not None:
        return first.to(call.q.device)
    if call.live is not None:
        return call.live.to(torch.int8).argmax(1) + call.k_start
    return torch.full((call.q.shape[0],), call.k_start, device=call.q.device)


def _run(call: Call, rows: slice) -> Call:
    """The call of some queries that follow each other."""
    return replace(
        call,
        q=call.q[:, :, rows],
        q_start=call.q_start + rows.start,
        row_live=None if call.row_live is None else call.row_live[:, rows],
        mask=None if call.mask is None else call.mask[:, :, rows],
    )


def _near(x: Tensor, blocks: int, size: int, back: int) -> Tensor:
    """[b g k d] -> [b g blocks (back + 1) * size d]: the keys of each block of queries, after those of earlier ones."""
    end = blocks * size - x.shape[2]
    x = pad(x, (0, 0, back * size, end)).unflatten(2, (-1, size))
    return torch.cat([x[:, :, i : i + blocks] for i in range(back + 1)], 3)


def _gathered(x: Tensor, column: Tensor) -> Tensor:
    """[b g k d] at columns [b s] -> [b g s d]."""
    return x.gather(2, column[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def _seen(
    call: Call, start: Tensor, column: Tensor, sink: int, recent: int, low: int, blocks: int, size: int, back: int
) -> tuple[Tensor, Tensor | None]:
    """Bool [b 1 n 1|r q k] over near keys, then sink keys, and what a mask adds to the logits; indices into k."""
    n, m = call.q.shape[2], call.k.shape[2]
    device = call.q.device
    row = low + torch.arange(blocks * size, device=device).view(blocks, size, 1)
    near = row[:, :1, :1] - back * size + torch.arange((back + 1) * size, device=device)
    # [b n q k], each part with keys of its own
    near, far = near[None], column[:, None, None]
    distance = row - near
    first = start[:, None, None, None]
    inside = (near >= low) & (near < m) & (distance >= 0) & (distance < recent) & (near - first >= sink)
    place = start[:, None] + torch.arange(sink, device=device)
    real = ((place >= 0) & (place < m))[:, None, None]
    parts = [(inside, near.expand(len(start), -1, -1, -1)), (real & (far <= row), far.expand(-1, blocks, 1, -1))]
    query = (row - (call.q_start - call.k_start)).clamp(0, n - 1)
    found, added = [], []
    for seen, key in parts:
        held = key.clamp(0, m - 1)
        if call.window is not None:
            seen = seen & (row - key < call.window)
        if call.live is not None:
            seen = seen & call.live.gather(1, held.flatten(1)).view(held.shape)
        if call.row_live is not None:
            seen = seen & call.row_live[:, query]
        seen = seen[:, None, :, None]
        if call.mask is not None:
            part = _mask(call.mask, call.sizes[2], query, held)
            if part.dtype == torch.bool:
                seen = seen & part
            else:
                seen = seen & (part > torch.finfo(part.dtype).min)
                added.append(part.to(call.dtype))
        found.append(seen)
    axes = torch.broadcast_shapes(*(x.shape[:-1] for x in found))
    whole = torch.cat([x.expand(*axes, x.shape[-1]) for x in found], -1)
    return whole, torch.cat([x.expand(*axes, x.shape[-1]) for x in added], -1) if added else None


def _mask(mask: Tensor, groups: int, query: Tensor, key: Tensor) -> Tensor:
    """A mask [b|1 1|h q k] at queries [n q 1] and keys [b n 1 k]: [b 1|g n 1|r q k]."""
    row = torch.arange(len(key), device=key.device)[:, None, None, None]
    picked = mask.expand(len(key), -1, -1, -1).movedim(1, -1)[row, query[None], key].movedim(-1, 1)
    return picked[:, :, :, None] if mask.shape[1] == 1 else picked.unflatten(1, (groups, -1)).transpose(2, 3)
