"""Triton: attention output, log-sum-exp and row reductions in one pass over the keys.

A program owns a tile of rows and walks over tiles of keys: those that every row sees run without a mask, the edges of
the causal triangle, the window and the padding with one. Beside the running softmax it carries, where asked, the masses
on key sets (one more small matrix product), the tile that holds each row's largest logit (the key inside of it is found
afterwards, by `gather.py`), the entropy, and one number per row and tile of keys, from which the map of blocks comes.
On Hopper, plain causal calls are served by `hopper.py` instead, with the same results.
Nothing is added by atomics: results are equal to the bit between runs and do not depend on the rest of the batch.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# what triton's launches and loops take is not typed

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.errors import UsageError
from interp.kernels.contract import Call
from interp.kernels.gpu import hopper
from interp.kernels.gpu.block_sums import BlockPlan, finish
from interp.kernels.gpu.key_sets import Sets, as_operand, by_product
from interp.kernels.gpu.tile_sizes import Tiling, pieces, tiling
from interp.kernels.gpu.tiles import (
    LOG2E,
    Operands,
    descriptors,
    edited,
    extent,
    flags,
    keys,
    operands,
    place,
    queries,
    reach,
    row_columns,
    seen,
    values,
)

WIDEST = 64
"""key sets of one pass"""
SCRATCH = 512 << 20
"""bytes for the sums of tiles, of which blocks are made"""
NONE = tl.constexpr(-(1 << 30))
"""the tile of a row that sees nothing"""


class Written(NamedTuple):
    """Where the kernel writes; None for what is not wanted."""

    out: Tensor | None
    out_b: int
    out_h: int
    out_n: int
    lse: Tensor
    mass: Tensor | None
    tile: Tensor | None
    peak: Tensor | None
    entropy: Tensor | None
    map: Tensor | None
    """[b h n m] sums of blocks"""
    map_n: int
    map_m: int
    scratch: Tensor | None
    """[slot tile row]: log2 of the sum of a tile's weights"""
    tiles: int
    row_shift: Tensor | None
    key_shift: Tensor | None
    """int32 [b]: tiles begin this many rows or keys before the first, so that blocks start at a prompt's first token"""


@dataclass(frozen=True)
class Found:
    """What one pass gave; rows are the queries of the call."""

    out: Tensor | None
    """[b h q e]"""
    lse: Tensor
    """float32 [b h q], natural log, learned sink included; -inf on dead rows"""
    mass: Tensor | None
    """float32 [b h q s]"""
    tile: Tensor | None
    """int32 [b h q] first key of the tile that holds the largest logit, far below 0 on dead rows"""
    peak: Tensor | None
    """float32 [b h q] probability of the largest logit"""
    entropy: Tensor | None
    """float32 [b h q] in nats, over keys alone"""
    map: Tensor | None
    """float32 [b h n m] sums of blocks, tiles of rows by blocks of keys"""
    tiling: Tiling


@triton.jit
def _sweep(
    acc, m, l, mass, tile, spread, q, op, to, sets, k_desc, v_desc, b, h, g, row, column, lo, hi, base, shift,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, GROUPS: tl.constexpr, EDGE: tl.constexpr,
    OUT: tl.constexpr, TOP: tl.constexpr, ENTROPY: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    for start in tl.range(lo, hi, BN):
        key = start + tl.arange(0, BN)
        if k_desc is not None and not (EDGE and op.live is not None):
            k = tl.reshape(k_desc.load([b, g, start, 0]), (BN, DP))
        else:
            k = keys(op, b, g, key, D, DP)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not PLAIN:
            x = edited(x, op, b, h, row[:, None], key[None, :], GROUPS, LOG2E)
        if EDGE:
            x = tl.where(seen(op, b, row[:, None], column[:, None], key[None, :], CAUSAL), x, float("-inf"))
        if PLAIN:
            top = tl.max(x, 1) * op.scale
        else:
            top = tl.max(x, 1)
        now = tl.maximum(m, top)
        safe = tl.where(now == float("-inf"), 0.0, now)
        if PLAIN:
            x = tl.fma(x, op.scale, -safe[:, None])
        else:
            x = x - safe[:, None]
        p = tl.exp2(x)
        fade = tl.exp2(m - safe)
        part = tl.sum(p, 1)
        if TOP:
            tile = tl.where(top > m, start, tile)
        if ENTROPY:
            # a hidden key has p = 0 and a logit of -inf, whose product would be nan
            moved = tl.where(l > 0.0, (m - safe) * l, 0.0)
            spread = fade * (spread + moved) + tl.sum(p * tl.maximum(x, -1e30), 1)
        if MAP:
            at = to.scratch + base + ((start - shift) // BN) * BM + tl.arange(0, BM)
            tl.store(at, safe + tl.log2(part))
        l = l * fade + part
        if OUT:
            if v_desc is not None and not (EDGE and op.live is not None):
                v = tl.reshape(v_desc.load([b, g, start, 0]), (BN, EP))
            else:
                v = values(op, b, g, key, E, EP)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        if S > 0:
            mass = by_product(
                mass * fade[:, None], p.to(sets.member.dtype.element_ty), op, sets, b, g, key, S, PRECISION
            )
        m = now
    return acc, m, l, mass, tile, spread


@triton.jit
def _forward(
    op, to, sets, q_desc, k_desc, v_desc, row_tiles, offset,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, GROUPS: tl.constexpr, OUT: tl.constexpr,
    TOP: tl.constexpr, ENTROPY: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    b, g, h, first_row = place(op, tl.program_id(0) + offset, row_tiles, BM)
    shift = 0
    if to.row_shift is not None:
        first_row += tl.load(to.row_shift + b)
        shift = tl.load(to.key_shift + b)
    row = first_row + tl.arange(0, BM)
    inside = (row >= 0) & (row < op.n_q)
    column = row_columns(op, row)
    low, high = extent(op, first_row, inside, column, BM)
    lo, clear, full, hi = reach(op, b, low, high, shift, BN, CAUSAL)
    if q_desc is not None:
        q = tl.reshape(q_desc.load([b, h, first_row, 0]), (BM, DP))
    else:
        q = queries(op, b, h, row, D, DP)
    acc = tl.zeros([BM, EP], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    spread = tl.zeros([BM], tl.float32)
    mass = tl.zeros([BM, S if S > 0 else 1], tl.float32)
    tile = tl.full([BM], NONE, tl.int32)
    base = tl.program_id(0).to(tl.int64) * to.tiles * BM
    if op.window is not None or op.live is not None or to.row_shift is not None:
        acc, m, l, mass, tile, spread = _sweep(
            acc, m, l, mass, tile, spread, q, op, to, sets, k_desc, v_desc, b, h, g, row, column, lo, clear, base,
            shift,
            D, DP, E, EP, S, BM, BN, CAUSAL, PLAIN, GROUPS, True, OUT, TOP, ENTROPY, MAP, PRECISION, LOG2E,
        )  # fmt: skip
    acc, m, l, mass, tile, spread = _sweep(
        acc, m, l, mass, tile, spread, q, op, to, sets, k_desc, v_desc, b, h, g, row, column, clear, full, base, shift,
        D, DP, E, EP, S, BM, BN, CAUSAL, PLAIN, GROUPS, False, OUT, TOP, ENTROPY, MAP, PRECISION, LOG2E,
    )  # fmt: skip
    acc, m, l, mass, tile, spread = _sweep(
        acc, m, l, mass, tile, spread, q, op, to, sets, k_desc, v_desc, b, h, g, row, column, full, hi, base, shift,
        D, DP, E, EP, S, BM, BN, CAUSAL, PLAIN, GROUPS, True, OUT, TOP, ENTROPY, MAP, PRECISION, LOG2E,
    )  # fmt: skip

    dead = (l == 0.0) | ~inside
    if op.row_live is not None:
        dead = dead | (tl.load(op.row_live + b.to(tl.int64) * op.n_q + row, mask=inside, other=0) == 0)
    safe = tl.where(dead, 0.0, m)
    over_keys = tl.where(dead, 1.0, l)
    total = over_keys
    peak = safe
    if op.sinks is not None:
        sink = tl.load(op.sinks + h) * LOG2E
        peak = tl.maximum(safe, sink)
        total = over_keys * tl.exp2(safe - peak) + tl.exp2(sink - peak)
    # what turns weights relative to the largest logit into probabilities
    norm = tl.where(dead, 0.0, tl.exp2(safe - peak) / total)
    lse = peak + tl.log2(total)
    at = (b * op.heads + h).to(tl.int64) * op.n_q + row
    tl.store(to.lse + at, tl.where(dead, float("-inf"), lse / LOG2E), mask=inside)
    if OUT:
        e = tl.arange(0, EP)
        where = b.to(tl.int64) * to.out_b + h.to(tl.int64) * to.out_h + row.to(tl.int64) * to.out_n
        result = tl.where(dead[:, None], 0.0, acc * norm[:, None])
        tl.store(
            to.out + where[:, None] + e[None, :],
            result.to(to.out.dtype.element_ty),
            mask=inside[:, None] & (e < E)[None, :],
        )
    if S > 0:
        s = tl.arange(0, S)
        result = tl.where(dead[:, None], 0.0, mass * norm[:, None])
        held = inside[:, None] & (s < sets.number)[None, :]
        tl.store(to.mass + at[:, None] * sets.number + s[None, :], result, mask=held)
    if TOP:
        tl.store(to.tile + at, tl.where(dead, NONE, tile), mask=inside)
        tl.store(to.peak + at, norm, mask=inside)
    if ENTROPY:
        entropy = (tl.log2(over_keys) - spread / over_keys) / LOG2E
        tl.store(to.entropy + at, tl.where(dead, 0.0, tl.maximum(entropy, 0.0)), mask=inside)


def forward(
    call: Call,
    *,
    out: bool = True,
    sets: Tensor | None = None,
    spans: bool = False,
    top: bool = False,
    entropy: bool = False,
    blocks: BlockPlan | None = None,
    tiles: Tiling | None = None,
) -> Found:
    """One pass over a call: the output, and what else was asked of its rows.

    out[b h q e] = sum over k of p v, p[b h q k] = exp(logit - lse); mass[b h q s] = sum over k of p sets[b k s];
    entropy[b h q] = log l - sum over k of p' logit', of keys alone. See `Found` for shapes and dtypes.
    sets: Float [b 1|g k s], up to WIDEST key sets, rounded to the dtype of v. spans: whether each is a few ranges of
    keys, which costs less on Hopper. blocks: how the map of blocks lies over
    the tiles. tiles: a tiling instead of the table's, or the plan's. Memory O(n); a call that the kernels cannot serve
    (`select.obstacle`) must not come here.
    Raises UsageError for more key sets than one pass holds.
    Cannot show: the key of the largest logit, only its tile (`gather.winners`); what a key receives (`columns`).
    """
    if sets is not None and sets.shape[-1] > WIDEST:
        raise UsageError(f"{sets.shape[-1]} key sets were given and one pass holds {WIDEST}: split them.")
    op = operands(call)
    b, h, _, n, m = call.sizes
    known = flags(call)
    settings = blocks.tiling if blocks is not None else tiles or forward_tiling(call, sets, out)
    device = op.q.device
    statistic: dict[str, Any] = {"dtype": torch.float32, "device": device}
    # tiles that are moved may be one more
    row_tiles = pieces(n + (blocks.rows - 1 if blocks is not None and not settings.groups else 0), settings.rows)
    tasks = row_tiles * b * h
    k_tiles = pieces(m, settings.keys) if blocks is None else blocks.k_tiles(m)
    # the sums of tiles are held for some of the programs at a time
    together = tasks if blocks is None else min(tasks, max(1, SCRATCH // (4 * k_tiles * settings.rows)))
    slots = hopper.SLOTS if settings.groups else together
    table = None if blocks is None else blocks.empty(b, h, row_tiles, m, device)

    # memory order [b q h e]: what follows attention reads the heads of a token together
    result = torch.empty(b, n, h, known["E"], dtype=call.v.dtype, device=device).transpose(1, 2) if out else None
    tile = settings.keys if spans and settings.groups else None
    held = None if sets is None else as_operand(sets.to(device), op.v.dtype, tile)
    to = Written(
        result,
        *((result.stride(i) for i in range(3)) if result is not None else (0, 0, 0)),
        torch.empty(b, h, n, **statistic),
        torch.empty(b, h, n, held.number, **statistic) if held is not None else None,
        torch.empty(b, h, n, dtype=torch.int32, device=device) if top else None,
        torch.empty(b, h, n, **statistic) if top else None,
        torch.empty(b, h, n, **statistic) if entropy else None,
        table,
        *((0, 0) if table is None else table.shape[2:]),
        None if table is None else torch.empty(slots * k_tiles * settings.rows, **statistic),
        k_tiles,
        *((None, None) if blocks is None else blocks.shifts(device)),
    )
    if settings.groups:
        hopper.launch(op, to, held, settings, row_tiles)
    for offset in range(0, 0 if settings.groups else tasks, max(1, together)):
        count = min(together, tasks - offset)
        _launch(op, to, held, known, settings, row_tiles, offset, count)
        if blocks is not None:
            finish(op, to, blocks, known, row_tiles, offset, count)
    return Found(result, to.lse, to.mass, to.tile, to.peak, to.entropy, table, settings)


def _launch(
    op: Operands, to: Written, sets: Sets | None, known: dict[str, Any], tiles: Tiling, row_tiles: int, offset: int,
    count: int,
) -> None:  # fmt: skip
    _forward[(count,)](
        op,
        to,
        sets,
        *descriptors(op, tiles, known, to.out is not None),
        row_tiles,
        offset,
        **known,
        S=0 if sets is None else sets.member.shape[-1],
        BM=tiles.rows,
        BN=tiles.keys,
        OUT=to.out is not None,
        TOP=to.tile is not None,
        ENTROPY=to.entropy is not None,
        MAP=to.scratch is not None,
        PRECISION=tiles.precision,
        LOG2E=LOG2E,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def forward_tiling(call: Call, sets: Tensor | None = None, out: bool = True) -> Tiling:
    """What the table says for a call, with or without key sets [b 1|g k s]."""
    known = flags(call)
    if out and (sets is None or sets.shape[-1] <= hopper.MOST_SETS):
        best = hopper.tiling_of(call)
        if best is not None:
            return best
    return tiling("forward" if sets is None else "masses", call.q, known["DP"], known["EP"])
