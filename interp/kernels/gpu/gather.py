"""Triton: single keys of each row, after the forward pass.

`winners` finds the key with the largest logit inside the tile that contains it, and `at` computes attention at listed
keys.
"""

# pyright: reportCallIssue=false
# launch options of triton kernels are not typed

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.contract import Call
from interp.kernels.gpu.tile_sizes import Tiling, ceil_div
from interp.kernels.gpu.tiles import LOG2E, edit_logits, flags, keys, operands, queries, row_columns, visible_keys

PAST_LAST_KEY = tl.constexpr(1 << 30)
"""An index larger than that of any key."""


@triton.jit
def _winners(
    op, order, tile_of, key_to, row_tiles,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    bh = task // row_tiles
    b, h = bh // op.heads, bh % op.heads
    g = h // op.group
    place = (task % row_tiles) * BM + tl.arange(0, BM)
    at = bh.to(tl.int64) * op.n_q
    # places count over all heads
    row = (tl.load(order + at + place, mask=place < op.n_q, other=at - 1) - at).to(tl.int32)
    tile = tl.load(tile_of + at + row, mask=row >= 0, other=-PAST_LAST_KEY)
    column = row_columns(op, row)
    q = queries(op, b, h, row, D, DP)
    best = tl.full([BM], -1, tl.int32)
    # rows are sorted by tile, so a program visits few tiles, each with one product
    start = tl.min(tl.where(tile > -PAST_LAST_KEY, tile, PAST_LAST_KEY), 0)
    while start < PAST_LAST_KEY:
        key = start + tl.arange(0, BN)
        k = keys(op, b, g, key, D, DP)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not PLAIN:
            x = edit_logits(x, op, b, h, row[:, None], key[None, :], GROUPS, LOG2E)
        x = tl.where(visible_keys(op, b, row[:, None], column[:, None], key[None, :], CAUSAL), x, float("-inf"))
        # the first of equals
        first = tl.min(tl.where(x == tl.max(x, 1)[:, None], key[None, :], PAST_LAST_KEY), 1)
        best = tl.where(tile == start, first, best)
        start = tl.min(tl.where(tile > start, tile, PAST_LAST_KEY), 0)
    tl.store(key_to + at + row, best, mask=row >= 0)


def winners(call: Call, tile: Tensor, tiles: Tiling) -> Tensor:
    """Find the key with the largest logit of each row inside a known tile.

    `key[b h q]` is the lowest k from `tile[b h q]` to `tile[b h q] + tiles.keys` with `logit[b h q k] = max over k`.

    Args:
        call: The attention call.
        tile: int32 [b h q], first key of the tile, as `forward` returns it.
        tiles: The tiling of that pass. With another tiling the logits may round differently, and a tie may be resolved
            to another key.

    Returns:
        Tensor: int64 [b h q], -1 on dead rows.

    Limits:
        The second largest logit is not found, because it may be in another tile.
    """
    op = operands(call)
    b, h, _, n, m = call.sizes
    key = torch.empty_like(tile, dtype=torch.int64)
    rows = min(64, max(16, tiles.rows))
    row_tiles = ceil_div(n, rows)
    if tile.numel():
        _winners[(b * h * row_tiles,)](
            op,
            order_by_tile(tile.view(b * h, n), tiles.keys, m),
            tile,
            key,
            row_tiles,
            **flags(call),
            BM=rows,
            BN=tiles.keys,
            PRECISION=tiles.precision,
            LOG2E=LOG2E,
            num_warps=4,
            num_stages=1,
        )
    return key


def order_by_tile(tile: Tensor, size: int, m: int) -> Tensor:
    """Sort entries by their tile, line by line.

    Args:
        tile: int32 [line entry], first keys of tiles; far below 0 for entries without a tile.
        size: Number of keys of a tile.
        m: Number of keys of the call.

    Returns:
        Tensor: int64 [line * entry], indices into the flattened `tile`. Entries of one line stay together, in a stable
            order, with those without a tile first.
    """
    lines, each = tile.shape[0], m // size + 3
    # a 16-bit sort takes half the passes of a 32-bit sort, and one sort of all lines needs the launches of one line
    small = lines * each <= 1 << 16
    number = torch.div(tile, size, rounding_mode="floor").clamp_(min=-2)
    number += torch.arange(2 - (1 << 15), lines * each, each, device=tile.device, dtype=torch.int32)[:lines, None]
    number = number.to(torch.int16) if small else number
    return number.view(-1).argsort(stable=True)


@triton.jit
def _at(
    op, lse, listed, each, weight, to, row_tiles,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr,
    PLAIN: tl.constexpr, GROUPS: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    bh = task // row_tiles
    b, h = bh // op.heads, bh % op.heads
    g = h // op.group
    row = (task % row_tiles) * BM + tl.arange(0, BM)
    inside = row < op.n_q
    column = row_columns(op, row)
    at = bh.to(tl.int64) * op.n_q + row
    norm = tl.load(lse + at, mask=inside, other=float("inf"))
    q = queries(op, b, h, row, D, DP).to(tl.float32)
    d = tl.arange(0, DP)
    for i in range(each):
        key = tl.load(listed + (b.to(tl.int64) * op.n_q + row) * each + i, mask=inside, other=-1)
        there = inside & (key >= 0) & (key < op.n_k)
        from_k = op.k + b.to(tl.int64) * op.k_b + g.to(tl.int64) * op.k_g
        from_k += key.to(tl.int64)[:, None] * op.k_n + d[None, :]
        k = tl.load(from_k, mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        x = tl.sum(q * k, 1)
        x = edit_logits(x, op, b, h, row, key, GROUPS, LOG2E)
        x = tl.where(there & visible_keys(op, b, row, column, key, CAUSAL), x, float("-inf"))
        p = tl.exp2(x - norm)
        if weight is not None:
            from_weight = weight + (b * (op.heads // op.group) + g).to(tl.int64) * op.n_k + key
            p = p * tl.load(from_weight, mask=there, other=0.0)
        tl.store(to + at * each + i, p, mask=inside)


def at(call: Call, lse: Tensor, listed: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute attention at listed keys.

    `found[b h q n] = exp(logit[b h q k] - lse[b h q]) weight[b g k]` with `k = listed[b q n]`. Every entry takes one
    dot product in float32, so the function is meant for few keys per row.

    Args:
        call: The attention call.
        lse: Float [b h q], natural log of the denominators, from any engine; infinite on dead rows.
        listed: Int [b q n], indices of keys, -1 for none.
        weight: Float [b g k], weights of the keys; None for 1.

    Returns:
        Tensor: float32 [b h q n], 0 if k is out of range or not visible.

    Limits:
        The result does not show whether a listed key is the one with the largest probability.
    """
    op = operands(call)
    b, h, _, n, m = call.sizes
    each = listed.shape[-1]
    found = torch.zeros(b, h, n, each, dtype=torch.float32, device=op.q.device)
    rows = 32
    row_tiles = ceil_div(n, rows)
    if found.numel():
        norm = (lse.to(torch.float32) * LOG2E).masked_fill(~lse.isfinite(), torch.inf).contiguous()
        index = listed.to(op.q.device).clamp(-1, m).to(torch.int32).expand(b, n, each).contiguous()
        _at[(b * h * row_tiles,)](
            op,
            norm,
            index,
            each,
            None if weight is None else weight.to(torch.float32).contiguous(),
            found,
            row_tiles,
            **flags(call),
            BM=rows,
            LOG2E=LOG2E,
            num_warps=4,
        )
    return found
