"""Triton: what each key receives, from (q, k, lse) of any engine: a second pass, keys on the rows of the product.

Sums along the rows of a tile stay inside of a thread's registers but for the last two steps, where sums across them
would not.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# what triton's launches and loops take is not typed

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.contract import Call
from interp.kernels.gpu.tile_sizes import Tiling, pieces, tiling
from interp.kernels.gpu.tiles import LOG2E, descriptor, edited, flags, keys, operands, queries, row_columns, seen


@triton.jit
def _step(
    total, most, saw, k, op, lse, weight, q_desc, b, h, key, lo, hi,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr,
    GROUPS: tl.constexpr, EDGE: tl.constexpr, SUM: tl.constexpr, MAX: tl.constexpr, SEEN: tl.constexpr,
    PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    at = (b * op.heads + h).to(tl.int64) * op.n_q
    row = lo + tl.arange(0, BM)
    # rows that see nothing, or do not exist, have a log-sum-exp of +inf: nothing of them is left
    norm = tl.load(lse + at + row, mask=row < op.n_q, other=float("inf"))
    for start in tl.range(lo, hi, BM):
        row = start + tl.arange(0, BM)
        # what the next step needs is under way while this one computes
        ahead = tl.load(lse + at + row + BM, mask=row + BM < op.n_q, other=float("inf"))
        if q_desc is not None:
            q = tl.reshape(q_desc.load([b, h, start, 0]), (BM, DP))
        else:
            q = queries(op, b, h, row, D, DP)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if not PLAIN:
            x = edited(x, op, b, h, row[None, :], key[:, None], GROUPS, LOG2E)
        if EDGE:
            column = row_columns(op, row)
            mask = seen(op, b, row[None, :], column[None, :], key[:, None], CAUSAL)
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
    # the first keys are seen by the most rows: long programs come first; the heads of one kv head side by side
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
            # rows that are padding may hold anything: each is hidden, key by key
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
    """What each key receives and from how many, out of a log-sum-exp that is there already.

    received[b h k] = sum over q of w[b h q] exp(logit[b h q k] - lse[b h q]), or the maximum instead
    saw[b h k] = sum over the q that see k of w[b h q]
    Both float32. lse: Float [b h q], natural log of the same rows' denominators, of any engine; both infinities mean a
    row that sees nothing. weights: Float [b h|1 q], 1 by default, not negative for "max"; rows that are padding never
    count. stat: "sum", "max", or "seen" for the second part alone. Memory O(n), bit-equal between runs.
    Cannot show: which rows a sum comes from. An error in lse is one of the same relative size in what is received.
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
    key_tiles = pieces(m, settings.keys)
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
    """[b h k] weight of the rows that see each key, where rows follow each other and biases do not differ by row."""
    b, h, _, n, m = call.sizes
    device = call.q.device
    weight = torch.ones(b, 1, n, dtype=torch.float64, device=device) if weights is None else weights.double()
    if call.row_live is not None:
        weight = weight * call.row_live[:, None]
    # the rows that see a key are neighbours: the difference of two running sums
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
