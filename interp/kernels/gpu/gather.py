"""Triton: single keys of single rows, after the pass.

The key inside of a row's winning tile, and attention at listed keys.
"""

# pyright: reportCallIssue=false
# triton's launch options are not typed

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.contract import Call
from interp.kernels.gpu.tile_sizes import Tiling, pieces
from interp.kernels.gpu.tiles import LOG2E, edited, flags, keys, operands, queries, row_columns, seen

NONE = tl.constexpr(1 << 30)
"""past every key"""


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
    tile = tl.load(tile_of + at + row, mask=row >= 0, other=-NONE)
    column = row_columns(op, row)
    q = queries(op, b, h, row, D, DP)
    best = tl.full([BM], -1, tl.int32)
    # rows come sorted by tile, so that few tiles are met, each by one product
    start = tl.min(tl.where(tile > -NONE, tile, NONE), 0)
    while start < NONE:
        key = start + tl.arange(0, BN)
        k = keys(op, b, g, key, D, DP)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not PLAIN:
            x = edited(x, op, b, h, row[:, None], key[None, :], GROUPS, LOG2E)
        x = tl.where(seen(op, b, row[:, None], column[:, None], key[None, :], CAUSAL), x, float("-inf"))
        # the first of equals
        first = tl.min(tl.where(x == tl.max(x, 1)[:, None], key[None, :], NONE), 1)
        best = tl.where(tile == start, first, best)
        start = tl.min(tl.where(tile > start, tile, NONE), 0)
    tl.store(key_to + at + row, best, mask=row >= 0)


def winners(call: Call, tile: Tensor, tiles: Tiling) -> Tensor:
    """The key with the largest logit of each row, once it is known in which tile it lies.

    key[b h q] = the lowest k of tile[b h q] .. + tiles.keys with logit[b h q k] = max over k; int64, -1 on dead rows.
    tile: int32 [b h q] first key of the tile, as `forward` gives it with the tiling `tiles`: with another tiling the
    logits may round differently, and a tie may fall to another key.
    Cannot show: the second best key, which may lie in another tile.
    """
    op = operands(call)
    b, h, _, n, m = call.sizes
    key = torch.empty_like(tile, dtype=torch.int64)
    rows = min(64, max(16, tiles.rows))
    row_tiles = pieces(n, rows)
    if tile.numel():
        _winners[(b * h * row_tiles,)](
            op,
            by_tile(tile.view(b * h, n), tiles.keys, m),
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


def by_tile(tile: Tensor, size: int, m: int) -> Tensor:
    """Int64 [line entry]: where the entries of `tile` [line entry], first keys of tiles, lie in the order of tiles.

    Entries of one line stay together, in stable order; those of no tile, far below 0, come first. m: keys of the call.
    """
    lines, each = tile.shape[0], m // size + 3
    # a sort of 16 bits takes half the passes of one of 32, and one of all lines the launches of one
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
        x = edited(x, op, b, h, row, key, GROUPS, LOG2E)
        x = tl.where(there & seen(op, b, row, column, key, CAUSAL), x, float("-inf"))
        p = tl.exp2(x - norm)
        if weight is not None:
            from_weight = weight + (b * (op.heads // op.group) + g).to(tl.int64) * op.n_k + key
            p = p * tl.load(from_weight, mask=there, other=0.0)
        tl.store(to + at * each + i, p, mask=inside)


def at(call: Call, lse: Tensor, listed: Tensor, weight: Tensor | None = None) -> Tensor:
    """Attention at listed keys.

    found[b h q n] = exp(logit[b h q k] - lse[b h q]) weight[b g k], k = listed[b q n]; float32, 0 where k is out of
    range or not seen. lse: Float [b h q], natural log, of any engine, infinite on dead rows. weight: Float [b g k], 1
    where none is given. One dot product in float32 an entry: meant for few keys a row.
    Cannot show: whether a listed key is the best one.
    """
    op = operands(call)
    b, h, _, n, m = call.sizes
    each = listed.shape[-1]
    found = torch.zeros(b, h, n, each, dtype=torch.float32, device=op.q.device)
    rows = 32
    row_tiles = pieces(n, rows)
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
