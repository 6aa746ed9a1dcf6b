"""Triton: the k largest logits of every row, by a separate pass over q k^T.

The k best keys of a row are in the k tiles with the largest maxima. The pass stores only the indices of these tiles, a
few numbers per row. A second kernel, which visits the rows sorted by tile, computes the logits of their keys again, and
a third selects the k best.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# launches and loops of triton kernels are not typed

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.contract import Call
from interp.kernels.gpu.gather import order_by_tile
from interp.kernels.gpu.tile_sizes import Tiling, ceil_div, next_power_of_2, tiling
from interp.kernels.gpu.tiles import (
    LOG2E,
    edit_logits,
    extent,
    flags,
    keys,
    operands,
    place,
    queries,
    reach,
    row_columns,
    visible_keys,
)

MAX_CANDIDATES = 1 << 24
"""Number of candidates in memory at once: 64 MiB."""
PAST_LAST_KEY = tl.constexpr(1 << 30)
"""An index larger than that of any key."""


@triton.jit
def _rank(
    tops, ids, q, op, b, h, g, row, column, lo, hi,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr,
    GROUPS: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    for start in tl.range(lo, hi, BN):
        key = start + tl.arange(0, BN)
        k = keys(op, b, g, key, D, DP)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not PLAIN:
            x = edit_logits(x, op, b, h, row[:, None], key[None, :], GROUPS, LOG2E)
        if EDGE:
            x = tl.where(visible_keys(op, b, row[:, None], column[:, None], key[None, :], CAUSAL), x, float("-inf"))
        top = tl.max(x, 1)
        # replace the smallest entry, the latest among equal ones, so that ties go to the lowest key
        worst = tl.min(tops, 1)
        last = tl.max(tl.where(tops == worst[:, None], ids, -2 * PAST_LAST_KEY), 1)
        hit = (ids == last[:, None]) & (top > worst)[:, None]
        tops = tl.where(hit, top[:, None], tops)
        ids = tl.where(hit, start, ids)
    return tops, ids


@triton.jit
def _best_tiles(
    op, ids_to, row_tiles,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KP: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    b, g, h, first_row = place(op, tl.program_id(0), row_tiles, BM)
    row = first_row + tl.arange(0, BM)
    inside = row < op.n_q
    column = row_columns(op, row)
    low, high = extent(op, first_row, inside, column, BM)
    lo, clear, full, hi = reach(op, b, low, high, 0, BN, CAUSAL)
    q = queries(op, b, h, row, D, DP)
    slot = tl.arange(0, KP)
    tops = tl.full([BM, KP], float("-inf"), tl.float32)
    # empty slots have distinct ids, so that only one of them is filled at a time
    ids = tl.zeros([BM, KP], tl.int32) - PAST_LAST_KEY - slot[None, :]
    if op.window is not None or op.live is not None:
        tops, ids = _rank(
            tops, ids, q, op, b, h, g, row, column, lo, clear, D, DP, BN, CAUSAL, PLAIN, GROUPS, True, PRECISION, LOG2E
        )
    tops, ids = _rank(
        tops, ids, q, op, b, h, g, row, column, clear, full, D, DP, BN, CAUSAL, PLAIN, GROUPS, False, PRECISION, LOG2E
    )
    tops, ids = _rank(
        tops, ids, q, op, b, h, g, row, column, full, hi, D, DP, BN, CAUSAL, PLAIN, GROUPS, True, PRECISION, LOG2E
    )
    at = ((b * op.heads + h).to(tl.int64) * op.n_q + row) * KP
    there = inside
    if op.row_live is not None:
        there = there & (tl.load(op.row_live + b.to(tl.int64) * op.n_q + row, mask=inside, other=0) != 0)
    # sort the candidates by key
    ids = tl.sort(tl.where(there[:, None], ids, -PAST_LAST_KEY), dim=1)
    tl.store(ids_to + at[:, None] + slot[None, :], ids, mask=inside[:, None])


@triton.jit
def _candidates(
    op, order, ids, to, from_row, each, programs,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KP: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0) // programs
    b, h = bh // op.heads, bh % op.heads
    g = h // op.group
    i = (tl.program_id(0) % programs) * BM + tl.arange(0, BM)
    base = bh.to(tl.int64) * each
    pair = tl.load(order + base + i, mask=i < each, other=0)
    tile = tl.load(ids + pair, mask=i < each, other=-PAST_LAST_KEY)
    row = from_row + ((pair - base) // KP).to(tl.int32)
    column = row_columns(op, row)
    q = queries(op, b, h, row, D, DP)
    start = tl.min(tl.where(tile >= 0, tile, PAST_LAST_KEY), 0)
    while start < PAST_LAST_KEY:
        key = start + tl.arange(0, BN)
        k = keys(op, b, g, key, D, DP)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if PLAIN:
            x = x * op.scale
        else:
            x = edit_logits(x, op, b, h, row[:, None], key[None, :], GROUPS, LOG2E)
        x = tl.where(visible_keys(op, b, row[:, None], column[:, None], key[None, :], CAUSAL), x, float("-inf"))
        tl.store(to + pair[:, None] * BN + tl.arange(0, BN)[None, :], x, mask=(tile == start)[:, None])
        start = tl.min(tl.where(tile > start, tile, PAST_LAST_KEY), 0)


@triton.jit
def _pick(
    logits, ids, lse, key_to, probability_to, lines, k,
    BM: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = line < lines
    place = tl.arange(0, KP * BN)
    x = tl.load(logits + line[:, None] * (KP * BN) + place[None, :], mask=inside[:, None], other=float("-inf"))
    norm = tl.load(lse + line, mask=inside, other=0.0) * LOG2E
    for i in range(k):
        # tiles are sorted by key, so the first of several equal logits belongs to the lowest key
        best, first = tl.max(x, 1, return_indices=True)
        found = best > float("-inf")
        key = tl.load(ids + line * KP + first // BN, mask=inside & found, other=0) + first % BN
        tl.store(key_to + line * k + i, tl.where(found, key, -1), mask=inside)
        tl.store(probability_to + line * k + i, tl.where(found, tl.exp2(best - norm), 0.0), mask=inside)
        x = tl.where(place[None, :] == first[:, None], float("-inf"), x)


def top_keys(call: Call, lse: Tensor, k: int, tiles: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """Find the k keys with the largest logits of each query, with ties resolved to the lowest key.

    The pass costs about half as much as a forward pass and O(n k) memory. The candidates of only some rows are in
    memory at a time.

    Args:
        call: The attention call.
        lse: Float [b h q], natural log of the denominators.
        k: Number of keys.
        tiles: Tiling to use instead of the one from the table.

    Returns:
        tuple: Index int64 [b h q k], -1 for none, and probability float32 [b h q k], which is `exp(logit - lse)`.
    """
    op = operands(call)
    b, h, _, n, m = call.sizes
    known = flags(call)
    settings = tiles or tiling("forward", op.q, known["DP"])
    width = max(2, next_power_of_2(k))
    row_tiles = ceil_div(n, settings.rows)
    ids = torch.empty(b, h, n, width, dtype=torch.int32, device=op.q.device)
    shared = known | {"BN": settings.keys, "KP": width, "PRECISION": settings.precision, "LOG2E": LOG2E}
    _best_tiles[(row_tiles * b * h,)](
        op, ids, row_tiles, **shared, BM=settings.rows, num_warps=settings.warps, num_stages=settings.stages
    )
    rows = max(1, min(n, MAX_CANDIDATES // (b * h * width * settings.keys)))
    found = [
        _of_rows(op, ids[:, :, start : start + rows].contiguous(), start, shared, min(64, settings.rows), lse, k, m)
        for start in range(0, n, rows)
    ]
    return torch.cat([key for key, _ in found], 2), torch.cat([probability for _, probability in found], 2)


def _of_rows(
    op, ids: Tensor, start: int, shared: dict, rows: int, lse: Tensor, k: int, m: int
) -> tuple[Tensor, Tensor]:
    b, h, n, width = ids.shape
    size = shared["BN"]
    logits = torch.full((b, h, n, width * size), -torch.inf, device=ids.device)
    programs = ceil_div(n * width, rows)
    _candidates[(b * h * programs,)](
        op,
        order_by_tile(ids.view(b * h, -1), size, m),
        ids,
        logits,
        start,
        n * width,
        programs,
        **shared,
        BM=rows,
        num_warps=4,
        num_stages=1,
    )
    key = torch.empty(b, h, n, k, dtype=torch.int64, device=ids.device)
    probability = torch.empty(b, h, n, k, device=ids.device)
    lines = max(1, 4096 // (width * size))
    _pick[(ceil_div(b * h * n, lines),)](
        logits,
        ids,
        lse[:, :, start : start + n].contiguous(),
        key,
        probability,
        b * h * n,
        k,
        BM=lines,
        BN=size,
        KP=width,
        LOG2E=LOG2E,
        num_warps=4 if width * size <= 4096 else 8,
    )
    return key, probability
