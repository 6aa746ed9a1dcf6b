"""Triton: attention output, log-sum-exp and row reductions in one pass over the keys.

A program owns a tile of rows and iterates over tiles of keys. Tiles that are visible to every row need no mask.
Only the tiles at the edges of the causal triangle, the window and the padding have one. In addition to the online
softmax, the program can compute:

- the masses on key sets, with one more small matrix product,
- the tile that contains the largest logit of each row (`gather.py` finds the key inside it afterwards),
- the entropy,
- one number per row and tile of keys, from which the map of blocks is computed.

On Hopper, `hopper.py` serves plain causal calls instead, with the same results. No sum uses atomics: results are
bit-identical between runs and do not depend on the rest of the batch.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# launches and loops of triton kernels are not typed

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
from interp.kernels.gpu.key_sets import KeySetOperand, add_masses, key_set_operand
from interp.kernels.gpu.tile_sizes import Tiling, ceil_div, tiling
from interp.kernels.gpu.tiles import (
    LOG2E,
    Operands,
    descriptors,
    edit_logits,
    extent,
    flags,
    keys,
    operands,
    place,
    queries,
    reach,
    row_columns,
    values,
    visible_keys,
)

MAX_SETS_PER_PASS = 64
"""Largest number of key sets of one pass."""
MAX_SCRATCH_BYTES = 512 << 20
"""Memory for the sums of tiles, from which blocks are computed, in bytes."""
NO_TILE = tl.constexpr(-(1 << 30))
"""The tile of a row that sees no key."""


class PassOutputs(NamedTuple):
    """Tensors that the kernel writes; None for those that are not requested. `PassResult` describes most of them."""

    out: Tensor | None
    out_b: int
    """Stride of `out` between prompts; the next two are those between heads and between rows."""
    out_h: int
    out_n: int
    lse: Tensor
    mass: Tensor | None
    tile: Tensor | None
    peak: Tensor | None
    entropy: Tensor | None
    map: Tensor | None
    """[b h n m], sums of blocks."""
    map_n: int
    """Size of the axis n of `map`."""
    map_m: int
    """Size of the axis m of `map`."""
    scratch: Tensor | None
    """[slot tile row], log2 of the sum of the weights of a tile."""
    tiles: int
    """Number of tiles of keys."""
    row_shift: Tensor | None
    """int32 [b], start of the first tile of rows, 0 or negative, so that blocks start at the first token."""
    key_shift: Tensor | None
    """int32 [b], start of the first tile of keys, 0 or negative."""


@dataclass(frozen=True)
class PassResult:
    """Results of one pass. Its rows are the queries of the call, and results that were not requested are None."""

    out: Tensor | None
    """[b h q e], the output."""
    lse: Tensor
    """float32 [b h q], natural log of the denominators, learned sink included; -inf on dead rows."""
    mass: Tensor | None
    """float32 [b h q s], masses on the key sets."""
    tile: Tensor | None
    """int32 [b h q], first key of the tile with the largest logit; far below 0 on dead rows."""
    peak: Tensor | None
    """float32 [b h q], probability of the key with the largest logit."""
    entropy: Tensor | None
    """float32 [b h q], entropy in nats, over keys alone."""
    map: Tensor | None
    """float32 [b h n m], sums of blocks: tiles of rows by blocks of keys."""
    tiling: Tiling
    """The tiling of the pass."""


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
            x = edit_logits(x, op, b, h, row[:, None], key[None, :], GROUPS, LOG2E)
        if EDGE:
            x = tl.where(visible_keys(op, b, row[:, None], column[:, None], key[None, :], CAUSAL), x, float("-inf"))
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
            # a hidden key has p = 0 and a logit of -inf, whose product would be NaN
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
            mass = add_masses(
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
    tile = tl.full([BM], NO_TILE, tl.int32)
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
    # factor that turns weights relative to the largest logit into probabilities
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
        there = inside[:, None] & (s < sets.number)[None, :]
        tl.store(to.mass + at[:, None] * sets.number + s[None, :], result, mask=there)
    if TOP:
        tl.store(to.tile + at, tl.where(dead, NO_TILE, tile), mask=inside)
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
) -> PassResult:
    """Compute the output and the requested row reductions of a call in one pass, in O(n) memory.

    With `p[b h q k] = exp(logit - lse)`, the output is `out[b h q e] = sum over k of p v`, the masses are
    `mass[b h q s] = sum over k of p sets[b k s]`, and the entropy over keys alone is
    `entropy[b h q] = log l - sum over k of p' logit'`.

    Args:
        call: The attention call. It must be one for which `select.obstacle` returns None.
        out: Whether to compute the output.
        sets: Float [b 1|g k s], up to MAX_SETS_PER_PASS key sets, rounded to the dtype of v.
        spans: Whether each set consists of a few ranges of keys, which costs less on Hopper.
        top: Whether to find the tile and the probability of the largest logit.
        entropy: Whether to compute the entropy.
        blocks: Plan of the map of blocks; None for no map.
        tiles: Tiling to use instead of the one from the table. The tiling of `blocks` takes precedence.

    Returns:
        PassResult: The results with their shapes and dtypes.

    Raises:
        UsageError: If there are more key sets than one pass supports.

    Limits:
        The pass finds only the tile of the largest logit (`gather.winners` finds the key), and it does not compute the
        attention that a key receives (`columns` does).
    """
    if sets is not None and sets.shape[-1] > MAX_SETS_PER_PASS:
        raise UsageError(f"{sets.shape[-1]} key sets exceed the limit of {MAX_SETS_PER_PASS} for one pass; split them.")
    op = operands(call)
    b, h, _, n, m = call.sizes
    known = flags(call)
    settings = blocks.tiling if blocks is not None else tiles or forward_tiling(call, sets, out)
    device = op.q.device
    statistic: dict[str, Any] = {"dtype": torch.float32, "device": device}
    # shifted tiles may need one more
    row_tiles = ceil_div(n + (blocks.rows - 1 if blocks is not None and not settings.groups else 0), settings.rows)
    tasks = row_tiles * b * h
    k_tiles = ceil_div(m, settings.keys) if blocks is None else blocks.k_tiles(m)
    # the sums of tiles are stored for some of the programs at a time
    together = tasks if blocks is None else min(tasks, max(1, MAX_SCRATCH_BYTES // (4 * k_tiles * settings.rows)))
    slots = hopper.SCRATCH_SLOTS if settings.groups else together
    table = None if blocks is None else blocks.empty(b, h, row_tiles, m, device)

    # memory order [b q h e], because the next layer reads the heads of a token together
    result = torch.empty(b, n, h, known["E"], dtype=call.v.dtype, device=device).transpose(1, 2) if out else None
    tile = settings.keys if spans and settings.groups else None
    operand = None if sets is None else key_set_operand(sets.to(device), op.v.dtype, tile)
    to = PassOutputs(
        result,
        *((result.stride(i) for i in range(3)) if result is not None else (0, 0, 0)),
        torch.empty(b, h, n, **statistic),
        torch.empty(b, h, n, operand.number, **statistic) if operand is not None else None,
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
        hopper.launch(op, to, operand, settings, row_tiles)
    for offset in range(0, 0 if settings.groups else tasks, max(1, together)):
        count = min(together, tasks - offset)
        _launch(op, to, operand, known, settings, row_tiles, offset, count)
        if blocks is not None:
            finish(op, to, blocks, known, row_tiles, offset, count)
    return PassResult(result, to.lse, to.mass, to.tile, to.peak, to.entropy, table, settings)


def _launch(
    op: Operands,
    to: PassOutputs,
    sets: KeySetOperand | None,
    known: dict[str, Any],
    tiles: Tiling,
    row_tiles: int,
    offset: int,
    count: int,
) -> None:
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
    """Return the tiling of a call from the table.

    Args:
        call: The attention call.
        sets: Float [b 1|g k s], the key sets of the pass; None for none.
        out: Whether the output is computed.

    Returns:
        Tiling: The tiling, that of `hopper.py` if it can serve the call.
    """
    known = flags(call)
    if out and (sets is None or sets.shape[-1] <= hopper.MAX_SETS):
        best = hopper.tiling_of(call)
        if best is not None:
            return best
    return tiling("forward" if sets is None else "masses", call.q, known["DP"], known["EP"])
