"""Triton: few query rows against many keys, for decode steps and chosen rows, with the keys split over programs.

The rows of all heads that share a kv head are in one tile, so that keys and values are read once. Each program writes
the logits of its share of the keys and its part of the softmax. A second launch merges the parts in a fixed order. The
reductions of these rows are computed from the logits. The shares depend on the number of keys alone, so results do not
change with the batch.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# launches of triton kernels are not typed

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.contract import Call
from interp.kernels.gpu.tile_sizes import Tiling, ceil_div, next_power_of_2, tiling
from interp.kernels.gpu.tiles import LOG2E, edit_logits, flags, keys, operands, row_columns, values, visible_keys

KEYS_PER_PROGRAM = 512
"""Smallest number of keys of one program."""
MAX_PROGRAMS_PER_ROW = 128
"""Largest number of programs that share the keys of a row."""


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
            x = edit_logits(x, op, b, h[:, None], row[:, None], key[None, :], GROUPS, LOG2E)
        x = tl.where(visible_keys(op, b, row[:, None], column[:, None], key[None, :], CAUSAL), x, float("-inf"))
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


def attend_few_rows(
    call: Call,
    *,
    out: bool = True,
    scores: str | None = "probs",
    tiles: Tiling | None = None,
    keys_per_program: int = KEYS_PER_PROGRAM,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Compute attention of a call with few queries, and its complete rows, in O(q k) memory.

    `lse = log sum over k of exp(logit)` with the learned sink included, `rows = exp(logit - lse)` or `logit`, and
    `out = sum over k of rows v`.

    Args:
        call: The attention call.
        out: Whether to compute the output.
        scores: "probs" for probabilities; "logits" for logits in natural units, -inf for keys that are not visible;
            None for no rows.
        tiles: Tiling to use instead of the one from the table.
        keys_per_program: Smallest number of keys of one program. At most MAX_PROGRAMS_PER_ROW programs share a row.

    Returns:
        tuple: Output [b h q e] in the dtype of v, log-sum-exp float32 [b h q], and rows float32 [b h q k]. Dead rows
            have lse -inf, output 0 and probabilities 0.

    Limits:
        All rows must fit into memory. The engine passes them in parts.
    """
    op = operands(call)
    b, h, g, n, m = call.sizes
    known = flags(call)
    settings = tiles or tiling("rows", op.q, known["DP"], known["EP"])
    made: dict[str, Any] = {"dtype": torch.float32, "device": op.q.device}
    length = ceil_div(max(keys_per_program, ceil_div(m, MAX_PROGRAMS_PER_ROW)), settings.keys) * settings.keys
    shares = ceil_div(m, length)
    height = min(64, max(settings.rows, next_power_of_2(h // g * n)))
    result = torch.zeros(b, h, n, known["E"], dtype=call.v.dtype, device=op.q.device) if out else None
    if not (b * n * shares):
        empty = torch.zeros(b, h, n, m, **made) if scores else None
        return result, torch.full((b, h, n), -torch.inf, **made), empty
    logits = torch.empty(b, h, n, m, **made) if scores else None
    lse = torch.empty(b, h, n, **made)
    parts = torch.empty(2, b, h, n, shares, **made)
    acc = torch.empty(b, h, n, shares, known["E"], **made) if out else None
    _shares[(shares, ceil_div(h // g * n, height), b * g)](
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
    piece = next_power_of_2(min(m, 4096))
    _merge[(b * h * n, ceil_div(m, piece) if probs else 1)](
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
        SP=next_power_of_2(shares),
        BN=piece,
        OUT=out,
        PROBS=probs,
        LOG2E=LOG2E,
        num_warps=4,
    )
    return result, lse, logits
