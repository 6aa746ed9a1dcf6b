"""Streaming attention: a query sees the first `sink` keys and the last `recent` keys, in O(n (sink + recent)) memory.

The implementation is plain torch and differentiable. `stream` attends to those keys, and `beyond` is the call over all
other keys. Together they cover every key that a query sees, each exactly once.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from interp.errors import UsageError
from interp.kernels.contract import Call
from interp.kernels.padding import without_padding

MIN_BLOCK_QUERIES = 32
"""Smallest number of queries of a block, so that a small `recent` does not lead to many small products."""
MAX_LOGITS = 1 << 26
"""Number of logits that are computed at once. A larger call is split into runs of queries."""


def stream(call: Call, sink: int, recent: int, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute attention of each query to the first `sink` and the last `recent` keys.

    Query i sees key j if the call makes it visible and `j - first < sink` or `0 <= i - j < recent`. Each block of
    queries is multiplied with the blocks of keys that it reaches and with the sink keys, which makes
    [b h q sink + recent + block] logits. At most MAX_LOGITS of them exist at a time, except in a backward pass, which
    needs all of them unless the caller splits the call by `query_runs`. Gradients flow into q, k and v.

    Args:
        call: The attention call, without edits and with consecutive rows.
        sink: Number of first keys.
        recent: Number of last keys, the query's own key included.
        first: Int [b], column of the first token of each prompt; by default the first live column.

    Returns:
        tuple: Output [b h q e] in the dtype of v, and log-sum-exp [b h q] in nats with the learned sink included. Rows
            that see no key are 0 and -inf.

    Raises:
        UsageError: If `sink` or `recent` is too small, if the call has edits, or if its rows are not consecutive.

    Examples:
        >>> from interp.kernels.contract import Call
        >>> from interp.kernels.streaming import stream
        >>> q = torch.zeros(1, 1, 5, 4)
        >>> out, lse = stream(Call(q, q, q, scale=1.0), sink=1, recent=2)
        >>> lse.exp().round()
        tensor([[[1., 2., 3., 3., 3.]]])
    """
    _check(call, sink, recent)
    b, h, g, n, m = call.sizes
    if 0 in (b, h, n, m):
        return call.v.new_zeros(b, h, n, call.v.shape[-1]), call.q.new_full((b, h, n), -torch.inf, dtype=call.dtype)
    start = _first_columns(call, first) - call.k_start
    call = without_padding(call)
    runs = list(query_runs(call, sink, recent))
    if len(runs) > 1:
        outs, lses = zip(*(stream(run, sink, recent, start + call.k_start) for run in runs), strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)
    size, back = _blocks(call, recent)
    begin = call.q_start - call.k_start
    # the band leaves out keys that no query can reach
    low = max(0, begin - recent + 1)
    ahead = begin - low
    blocks = -(-(ahead + n) // size)
    q = pad(call.q.to(call.dtype) * call.scale, (0, 0, ahead, blocks * size - ahead - n))
    q = q.view(b, g, h // g, blocks, size, -1).transpose(2, 3).reshape(b, g, blocks, h // g * size, -1)

    near_k, near_v = (_near_keys(x[:, :, low : begin + n].to(call.dtype), blocks, size, back) for x in (call.k, call.v))
    column = (start[:, None] + torch.arange(sink, device=start.device)).clamp(0, m - 1)
    far_k, far_v = (_gather_columns(x.to(call.dtype), column) for x in (call.k, call.v))
    score = torch.cat([q @ near_k.mT, q @ far_k[:, :, None].mT], -1).unflatten(-2, (h // g, size))
    if call.softcap is not None:
        score = torch.tanh(score / call.softcap) * call.softcap
    seen, bias = _visible(call, start, column, sink, recent, low, blocks, size, back)
    if bias is not None:
        score = score + bias
    # a large finite number, because the gradient of -inf - -inf is NaN
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


def query_runs(call: Call, sink: int, recent: int, limit: int = MAX_LOGITS) -> Iterator[Call]:
    """Split a call into calls of consecutive queries, each with about `limit` logits in `stream`.

    Args:
        call: The attention call.
        sink: Number of first keys.
        recent: Number of last keys.
        limit: Number of logits of a run; a run has at least one block of queries.

    Yields:
        Call: The call of a run, or the call itself where it is small enough.
    """
    b, h, _, n, _ = call.sizes
    size, back = _blocks(call, recent)
    most = max(size, limit // max(1, b * h * (sink + (back + 1) * size)))
    if n <= most:
        yield call
        return
    for start in range(0, n, most):
        yield _query_run(call, slice(start, min(n, start + most)))


def _blocks(call: Call, recent: int) -> tuple[int, int]:
    """Number of queries of a block, and number of earlier blocks that it reaches."""
    size = max(MIN_BLOCK_QUERIES, min(recent, call.sizes[4]))
    return size, -(-(recent - 1) // size)


def beyond(call: Call, sink: int, recent: int, first: Tensor | None = None) -> Call:
    """Return the call over the keys that `stream` leaves out.

    Each query is moved back by `recent` columns, and the sink keys are dead. Any engine can serve the call. It has no
    learned sink, which `stream` includes, so that the two denominators add up to that of the whole call.

    Args:
        call: The attention call, without edits and with consecutive rows.
        sink: Number of first keys.
        recent: Number of last keys, the query's own key included.
        first: Int [b], column of the first token of each prompt; by default the first live column.

    Returns:
        Call: The call over the other keys.

    Raises:
        UsageError: If `sink` or `recent` is too small, if the call has edits, or if its rows are not consecutive.
    """
    _check(call, sink, recent)
    column = torch.arange(call.k_start, call.k_start + call.k.shape[2], device=call.q.device)
    live = column >= _first_columns(call, first)[:, None] + sink
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
        raise UsageError(f"sink={sink} and recent={recent} are not valid; pass sink >= 0 and recent >= 1.")
    if call.edited or call.row_columns is not None:
        raise UsageError("streaming attention does not support edits or chosen rows; pass an unmodified call.")


def _first_columns(call: Call, first: Tensor | None) -> Tensor:
    if first is not None:
        return first.to(call.q.device)
    if call.live is not None:
        return call.live.to(torch.int8).argmax(1) + call.k_start
    return torch.full((call.q.shape[0],), call.k_start, device=call.q.device)


def _query_run(call: Call, rows: slice) -> Call:
    """The call of a run of consecutive queries."""
    return replace(
        call,
        q=call.q[:, :, rows],
        q_start=call.q_start + rows.start,
        row_live=None if call.row_live is None else call.row_live[:, rows],
        mask=None if call.mask is None else call.mask[:, :, rows],
    )


def _near_keys(x: Tensor, blocks: int, size: int, back: int) -> Tensor:
    """[b g k d] -> [b g blocks (back + 1) * size d]: the keys of the earlier blocks and of each block of queries."""
    end = blocks * size - x.shape[2]
    x = pad(x, (0, 0, back * size, end)).unflatten(2, (-1, size))
    return torch.cat([x[:, :, i : i + blocks] for i in range(back + 1)], 3)


def _gather_columns(x: Tensor, column: Tensor) -> Tensor:
    """[b g k d] at columns [b s] -> [b g s d]."""
    return x.gather(2, column[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def _visible(
    call: Call, start: Tensor, column: Tensor, sink: int, recent: int, low: int, blocks: int, size: int, back: int
) -> tuple[Tensor, Tensor | None]:
    """Bool [b 1 n 1|r q k], visibility of the near keys and then the sink keys, and the additive mask on these axes."""
    n, m = call.q.shape[2], call.k.shape[2]
    device = call.q.device
    row = low + torch.arange(blocks * size, device=device).view(blocks, size, 1)
    near = row[:, :1, :1] - back * size + torch.arange((back + 1) * size, device=device)
    # [b n q k], with different keys in the two parts
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
        index = key.clamp(0, m - 1)
        if call.window is not None:
            seen = seen & (row - key < call.window)
        if call.live is not None:
            seen = seen & call.live.gather(1, index.flatten(1)).view(index.shape)
        if call.row_live is not None:
            seen = seen & call.row_live[:, query]
        seen = seen[:, None, :, None]
        if call.mask is not None:
            part = _mask_at(call.mask, call.sizes[2], query, index)
            if part.dtype == torch.bool:
                seen = seen & part
            else:
                seen = seen & (part > torch.finfo(part.dtype).min)
                added.append(part.to(call.dtype))
        found.append(seen)
    axes = torch.broadcast_shapes(*(x.shape[:-1] for x in found))
    whole = torch.cat([x.expand(*axes, x.shape[-1]) for x in found], -1)
    return whole, torch.cat([x.expand(*axes, x.shape[-1]) for x in added], -1) if added else None


def _mask_at(mask: Tensor, groups: int, query: Tensor, key: Tensor) -> Tensor:
    """[b 1|g n 1|r q k], the values of a mask [b|1 1|h q k] at queries [n q 1] and keys [b n 1 k]."""
    row = torch.arange(len(key), device=key.device)[:, None, None, None]
    picked = mask.expand(len(key), -1, -1, -1).movedim(1, -1)[row, query[None], key].movedim(-1, 1)
    return picked[:, :, :, None] if mask.shape[1] == 1 else picked.unflatten(1, (groups, -1)).transpose(2, 3)
