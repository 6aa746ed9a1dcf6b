"""Triton: few query rows against many keys, split over the keys: decode steps and chosen rows.

The rows of the heads that share a kv head lie in one tile, so that keys and values are read once. Each program writes
the logits of its share of the keys, which are the answer or what every reduction of these rows is made of, and its part
of the softmax; a second launch merges the parts in a fixed order. Shares depend on the number of keys alone: results do
not change with the batch.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# triton's launch options and cdiv are not typed

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.contract import Call
from interp.kernels.gpu.tile_sizes import Tiling, pieces, power, tiling
from interp.kernels.gpu.tiles import LOG2E, edited, flags, keys, operands, row_columns, seen, values

SHARE = 512
"""keys of one program"""
MOST = 128
"""programs that share the keys of a row"""


@triton.jit
def _shares(
    op, logits_to, m_to, l_to, acc_to, shares, length,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, GROUPS: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    share, bg = tl.program_id(0), tl.program_id(2)
    b, g = bg // (op.heads // op.group), bg % (op.heads // op.group)
    place = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = place < op.group * op.n_q
    h = g * op.group + tl.minimum(place // op.n_q, op.group - 1)
    row = tl.where(inside, place % op.n_q, -1)
    column = row_columns(op, row)
    d = tl.arange(0, DP)
    at = op.q + b.to(tl.int64) * op.q_b + h.to(tl.int64) * op.q_h + row.to(tl.int64) * op.q_n
    q = tl.load(at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    line = (b * op.heads + h).to(tl.int64) * op.n_q + row
    acc = tl.zeros([BM, EP], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    for start in tl.range(share * length, tl.minimum((share + 1) * length, op.n_k), BN):
        key = start + tl.arange(0, BN)
        k = keys(op, b, g, key, D, DP)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if PLAIN:
            x = x * op.scale
        else:
            x = edited(x, op, b, h[:, None], row[:, None], key[None, :], GROUPS, LOG2E)
        x = tl.where(seen(op, b, row[:, None], column[:, None], key[None, :], CAUSAL), x, float("-inf"))
        if logits_to is not None:
            to = logits_to + line[:, None] * op.n_k + key[None, :]
            tl.store(to, x / LOG2E, mask=inside[:, None] & (key < op.n_k)[None, :])
        now = tl.maximum(m, tl.max(x, 1))
        safe = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp2(x - safe[:, None])
        fade = tl.exp2(m - safe)
        l = l * fade + tl.sum(p, 1)
        if OUT:
            v = values(op, b, g, key, E, EP)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        m = now
    part = line * shares + share
    tl.store(m_to + part, m, mask=inside)
    tl.store(l_to + part, l, mask=inside)
    if OUT:
        e = tl.arange(0, EP)
        tl.store(acc_to + part[:, None] * E + e[None, :], acc, mask=inside[:, None] & (e < E)[None, :])


@triton.jit
def _merge(
    op, logits_to, m_from, l_from, acc_from, out_to, lse_to, shares, length,
    E: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr, BN: tl.constexpr, OUT: tl.constexpr, PROBS: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    line, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h = (line // op.n_q) % op.heads
    s = tl.arange(0, SP)
    m = tl.load(m_from + line * shares + s, mask=s < shares, other=float("-inf"))
    l = tl.load(l_from + line * shares + s, mask=s < shares, other=0.0)
    top = tl.max(m, 0)
    dead = top == float("-inf")
    peak = tl.where(dead, 0.0, top)
    if op.sinks is not None:
        peak = tl.maximum(peak, tl.load(op.sinks + h) * LOG2E)
    weight = tl.exp2(m - peak)
    total = tl.sum(weight * l, 0)
    if op.sinks is not None:
        total += tl.exp2(tl.load(op.sinks + h) * LOG2E - peak)
    total = tl.where(dead, 1.0, total)
    lse = tl.where(dead, float("-inf"), (peak + tl.log2(total)) / LOG2E)
    if piece == 0:
        tl.store(lse_to + line, lse)
        if OUT:
            e = tl.arange(0, EP)
            at = acc_from + (line * shares + s)[:, None] * E + e[None, :]
            acc = tl.load(at, mask=(s < shares)[:, None] & (e < E)[None, :], other=0.0)
            merged = tl.where(dead, 0.0, tl.sum(acc * weight[:, None], 0) / total)
            tl.store(out_to + line * E + e, merged.to(out_to.dtype.element_ty), mask=e < E)
    if PROBS:
        key = piece * length + tl.arange(0, BN)
        there = (key < op.n_k) & (key < (piece + 1) * length)
        x = tl.load(logits_to + line * op.n_k + key, mask=there, other=float("-inf"))
        p = tl.where(dead, 0.0, tl.exp2((x - lse) * LOG2E))
        tl.store(logits_to + line * op.n_k + key, p, mask=there)


def rows(
    call: Call, *, out: bool = True, scores: str | None = "probs", tiles: Tiling | None = None, share: int = SHARE
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(out [b h q e], lse [b h q], rows [b h q k]) of a call of few queries.

    lse = log sum over k of exp(logit), learned sink included; rows = exp(logit - lse) or logit; out = sum over k of
    rows v. lse and rows in float32, out in the dtype of v; dead rows have lse -inf, out and probabilities 0.
    scores: "probs"; "logits", natural units and -inf where a query may not look; None for no rows.
    share: keys of one program, at least; no row is shared by more than MOST. Memory O(q k).
    Cannot show: more rows than memory holds; `fused` takes them some at a time.
    """
    op = operands(call)
    b, h, g, n, m = call.sizes
    known = flags(call)
    settings = tiles or tiling("rows", op.q, known["DP"], known["EP"])
    made: dict[str, Any] = {"dtype": torch.float32, "device": op.q.device}
    length = pieces(max(share, pieces(m, MOST)), settings.keys) * settings.keys
    shares = pieces(m, length)
    height = min(64, max(settings.rows, power(h // g * n)))
    result = torch.zeros(b, h, n, known["E"], dtype=call.v.dtype, device=op.q.device) if out else None
    if not (b * n * shares):
        empty = torch.zeros(b, h, n, m, **made) if scores else None
        return result, torch.full((b, h, n), -torch.inf, **made), empty
    logits = torch.empty(b, h, n, m, **made) if scores else None
    lse = torch.empty(b, h, n, **made)
    parts = torch.empty(2, b, h, n, shares, **made)
    acc = torch.empty(b, h, n, shares, known["E"], **made) if out else None
    _shares[(shares, pieces(h // g * n, height), b * g)](
        op,
        logits,
        parts[0],
        parts[1],
        acc,
        shares,
        length,
        **known,
        BM=height,
        BN=settings.keys,
        OUT=out,
        PRECISION=settings.precision,
        LOG2E=LOG2E,
        num_warps=settings.warps,
        num_stages=settings.stages,
    )
    probs = scores == "probs"
    piece = power(min(m, 4096))
    _merge[(b * h * n, pieces(m, piece) if probs else 1)](
        op,
        logits,
        parts[0],
        parts[1],
        acc,
        result,
        lse,
        shares,
        piece,
        E=known["E"],
        EP=known["EP"],
        SP=power(shares),
        BN=piece,
        OUT=out,
        PROBS=probs,
        LOG2E=LOG2E,
        num_warps=4,
    )
    return result, lse, logits
