"""Triton: the attention that each key receives, from q, k and the log-sum-exp of any engine.

This is a second pass whose matrix product has the keys as its rows. A sum along the rows of a tile stays in the
registers of a thread except for the last two steps; a sum across rows would not.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# launches and loops of triton kernels are not typed

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.contract import Call
from interp.kernels.gpu.tile_sizes import Tiling, ceil_div, tiling
from interp.kernels.gpu.tiles import (
    LOG2E,
    descriptor,
    edit_logits,
    flags,
    keys,
    operands,
    queries,
    row_columns,
    visible_keys,
)


@triton.jit
def _step(
    total, most, saw, k, op, lse, weight, q_desc, b, h, key, lo, hi,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr,
    GROUPS: tl.constexpr, EDGE: tl.constexpr, SUM: tl.constexpr, MAX: tl.constexpr, SEEN: tl.constexpr,
    PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    at = (b * op.heads + h).to(tl.int64) * op.n_q
    row = lo + tl.arange(0, BM)
    # rows that see no key, or do not exist, get a log-sum-exp of +inf, which makes their weights 0
    norm = tl.load(lse + at + row, mask=row < op.n_q, other=float("inf"))
    for start in tl.range(lo, hi, BM):
        row = start + tl.arange(0, BM)
        # prefetch for the next step
        ahead = tl.load(lse + at + row + BM, mask=row + BM < op.n_q, other=float("inf"))
        if q_desc is not None:
            q = tl.reshape(q_desc.load([b, h, start, 0]), (BM, DP))
        else:
            q = queries(op, b, h, row, D, DP)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if not PLAIN:
            x = edit_logits(x, op, b, h, row[None, :], key[:, None], GROUPS, LOG2E)
        if EDGE:
            column = row_columns(op, row)
            mask = visible_keys(op, b, row[None, :], column[None, :], key[:, None], CAUSAL)
            if PLAIN:
                x = tl.where(mask, x * op.scale, float("-inf"))
            else:
                x = tl.where(mask, x, float("-inf"))
            p = tl.exp2(x - norm[None, :])
        elif PLAIN:
            p = tl.exp2(tl.fma(x, op.scale, -norm[None, :]))
        else:
            p = tl.exp2(x - norm[None, :])
        if weight is not None:
            w = tl.load(weight + at + row, mask=row < op.n_q, other=0.0)
            p = p * w[None, :]
        if SUM:
            total += tl.sum(p, 1)
        if MAX:
            most = tl.maximum(most, tl.max(p, 1))
        if SEEN:
            there = x > float("-inf")
            if weight is not None:
                saw += tl.sum(tl.where(there, w[None, :], 0.0), 1)
            else:
                saw += tl.sum(there.to(tl.float32), 1)
        norm = ahead
    return total, most, saw


@triton.jit
def _columns(
    op, lse, weight, total_to, most_to, seen_to, q_desc, key_tiles,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, GROUPS: tl.constexpr, SUM: tl.constexpr, MAX: tl.constexpr,
    SEEN: tl.constexpr, PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    # the first keys are visible to the most rows, so long programs come first; heads of one kv head are neighbours
    each = key_tiles * op.group
    bg, rest = task // each, task % each
    b, g = bg // (op.heads // op.group), bg % (op.heads // op.group)
    h = g * op.group + rest % op.group
    first = (rest // op.group) * BN
    key = first + tl.arange(0, BN)
    last = tl.minimum(first + BN, op.n_k) - 1
    # rows that see any of the keys, and rows that see all of them
    lo, hi = 0, op.n_q
    clear, full = 0, op.n_q
    if op.rows is not None:
        full = 0
    else:
        away = op.k_start - op.q_start
        if CAUSAL:
            lo = tl.maximum(lo, first + away)
            clear = tl.maximum(clear, last + away)
        if op.window is not None:
            hi = tl.minimum(hi, last + away + op.window)
            full = tl.minimum(full, first + away + op.window)
        if op.live is not None:
            full = tl.where(first >= tl.load(op.clear + b), full, 0)
        if op.row_live is not None:
            # rows that are padding may hold any values, so they are masked key by key
            clear = tl.maximum(clear, tl.load(op.row_clear + b))
        if SEEN:
            full = 0
    lo = lo // BM * BM
    clear = tl.minimum((clear + BM - 1) // BM * BM, ((hi + BM - 1) // BM) * BM)
    clear = tl.maximum(clear, lo)
    full = tl.maximum(full // BM * BM, clear)
    k = keys(op, b, g, key, D, DP)
    total = tl.zeros([BN], tl.float32)
    most = tl.zeros([BN], tl.float32)
    saw = tl.zeros([BN], tl.float32)
    total, most, saw = _step(
        total, most, saw, k, op, lse, weight, q_desc, b, h, key, lo, clear,
        D, DP, BM, CAUSAL, PLAIN, GROUPS, True, SUM, MAX, SEEN, PRECISION, LOG2E,
    )  # fmt: skip
    total, most, saw = _step(
        total, most, saw, k, op, lse, weight, q_desc, b, h, key, clear, full,
        D, DP, BM, CAUSAL, PLAIN, GROUPS, False, SUM, MAX, SEEN, PRECISION, LOG2E,
    )  # fmt: skip
    total, most, saw = _step(
        total, most, saw, k, op, lse, weight, q_desc, b, h, key, full, hi,
        D, DP, BM, CAUSAL, PLAIN, GROUPS, True, SUM, MAX, SEEN, PRECISION, LOG2E,
    )  # fmt: skip
    at = (b * op.heads + h).to(tl.int64) * op.n_k + key
    if SUM:
        tl.store(total_to + at, total, mask=key < op.n_k)
    if MAX:
        tl.store(most_to + at, most, mask=key < op.n_k)
    if SEEN:
        tl.store(seen_to + at, saw, mask=key < op.n_k)


def columns(
    call: Call, lse: Tensor, stat: str = "sum", weights: Tensor | None = None, tiles: Tiling | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the attention that each key receives and the weight of the rows that see it, from a log-sum-exp.

    `received[b h k] = sum over q of w[b h q] exp(logit[b h q k] - lse[b h q])`, or the maximum over q, and
    `saw[b h k] = sum over the q that see k of w[b h q]`. The pass takes O(n) memory and is bit-identical between runs.

    Args:
        call: The attention call.
        lse: Float [b h q], natural log of the denominators of the rows, from any engine. Both infinities mark a row
            that sees no key.
        stat: "sum", "max", or "seen" to compute `saw` alone.
        weights: Float [b h|1 q], 1 by default; not negative for "max". Rows that are padding never count.
        tiles: Tiling to use instead of the one from the table.

    Returns:
        tuple: `received` and `saw`, float32 [b h k].

    Limits:
        The result does not show which rows a sum comes from. An absolute error in lse is a relative error of the same
        size in `received`.
    """
    op = operands(call)
    b, h, _, n, m = call.sizes
    known = flags(call)
    settings = tiles or tiling("columns", op.q, known["DP"])
    norm = (lse.to(torch.float32) * LOG2E).masked_fill(~lse.isfinite(), torch.inf).contiguous()
    weight = None if weights is None else weights.to(torch.float32).expand(b, h, n).contiguous()
    made: dict[str, Any] = {"dtype": torch.float32, "device": op.q.device}
    received = torch.zeros(b, h, m, **made)
    counted = call.row_coef is not None or call.row_columns is not None
    saw = torch.zeros(b, h, m, **made) if counted else None
    key_tiles = ceil_div(m, settings.keys)
    if b * h * key_tiles and n and (counted or stat != "seen"):
        _columns[(b * h * key_tiles,)](
            op,
            norm,
            weight,
            received if stat == "sum" else None,
            received if stat == "max" else None,
            saw,
            descriptor(op.q, settings.rows, known["DP"]) if settings.descriptors and op.rows is None else None,
            key_tiles,
            **known,
            BM=settings.rows,
            BN=settings.keys,
            SUM=stat == "sum",
            MAX=stat == "max",
            SEEN=counted,
            PRECISION=settings.precision,
            LOG2E=LOG2E,
            num_warps=settings.warps,
            num_stages=settings.stages,
        )
    return received, _seen(call, weights) if saw is None else saw


def _seen(call: Call, weights: Tensor | None) -> Tensor:
    """[b h k] weight of the rows that see each key, for consecutive rows and biases that are the same for all rows."""
    b, h, _, n, m = call.sizes
    device = call.q.device
    weight = torch.ones(b, 1, n, dtype=torch.float64, device=device) if weights is None else weights.double()
    if call.row_live is not None:
        weight = weight * call.row_live[:, None]
    # the rows that see a key are consecutive, so their weight is the difference of two cumulative sums
    upto = torch.nn.functional.pad(weight.cumsum(-1), (1, 0))
    key = torch.arange(m, device=device) + call.k_start - call.q_start
    first = key.clamp(0, n) if call.causal else torch.zeros_like(key)
    stop = torch.full_like(key, n) if call.window is None else (key + call.window).clamp(0, n)
    saw = upto[..., torch.maximum(stop, first)] - upto[..., first]
    if call.live is not None:
        saw = saw * call.live[:, None]
    if call.key_bias is not None:
        saw = saw * (call.key_bias > -torch.inf)
    return saw.float().expand(b, h, m)
