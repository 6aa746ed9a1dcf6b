"""Gluon: the forward pass for causal calls on Hopper GPUs, which overlaps matrix products with the softmax.

One group of warps requests tiles of k and v from the copy engine, and two groups own 64 rows each. Within a group, the
next q k^T runs while the last p v is still running. Between the groups, one computes exponentials while the other
multiplies. `forward.py` serves all other calls (windows, padding, logit scales, float32), with the same results.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false
# layouts and launches of gluon are not typed

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from interp.kernels.contract import Call
from interp.kernels.gpu.hopper_scores import (
    add_mixed_mass,
    add_stretch_mass,
    add_tile_bias,
    add_to_map,
    biases_by_tile,
    has_dominant_bias,
    multiprocessor,
    store_tile_sum,
)
from interp.kernels.gpu.key_sets import KeySetOperand
from interp.kernels.gpu.tile_sizes import HOPPER_TILINGS, Tiling
from interp.kernels.gpu.tiles import LOG2E, Operands, descriptor_strides, is_copyable

NO_TILE = gl.constexpr(-(1 << 30))


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, e_desc, q_s, k_s, v_s, e_s, q_full, k_full, k_empty, v_full, v_empty, b, h, g, bank,
    first_row, tiles,
    BN: gl.constexpr, D: gl.constexpr, S: gl.constexpr, STAGES: gl.constexpr, WGS: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(q_full, WGS * 64 * D * 2)
    for i in gl.static_range(WGS):
        tma.async_copy_global_to_shared(q_desc, [b, h, first_row + 64 * i, 0], q_full, q_s.index(i))
    for j in range(tiles):
        stage = j % STAGES
        phase = (j // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), BN * D * 2)
        tma.async_copy_global_to_shared(k_desc, [b, g, j * BN, 0], k_full.index(stage), k_s.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), BN * (D + S) * 2)
        tma.async_copy_global_to_shared(v_desc, [b, g, j * BN, 0], v_full.index(stage), v_s.index(stage))
        if S > 0:
            tma.async_copy_global_to_shared(e_desc, [bank, j * BN, 0], v_full.index(stage), e_s.index(stage))


@gluon.jit
def _softmax(
    x, m, l, tile, spread, scale, shift, start, first_row, op, EDGE: gl.constexpr, TOP: gl.constexpr,
    ENTROPY: gl.constexpr, BN: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return the weights of one tile relative to the new maximum, and the updated row statistics."""
    if EDGE:
        row = first_row + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
        key = start + gl.arange(0, BN, gl.SliceLayout(0, S_LAYOUT))
        seen = (key[None, :] + (op.k_start - op.q_start) <= row[:, None]) & (key < op.n_k)[None, :]
        x = gl.where(seen, x, float("-inf"))
    top = gl.max(x, 1) * scale
    if shift is not None:
        top = top + shift
    now = gl.maximum(m, top)
    safe = gl.where(now == float("-inf"), 0.0, now)
    less = -safe
    if shift is not None:
        less = shift - safe
    x = gl.fma(x, gl.full([64, BN], 0.0, gl.float32, S_LAYOUT) + scale, less[:, None])
    p = gl.exp2(x)
    fade = gl.exp2(m - safe)
    if TOP:
        tile = gl.where(top > m, start, tile)
    if ENTROPY:
        moved = gl.where(l > 0.0, (m - safe) * l, 0.0)
        spread = fade * (spread + moved) + gl.sum(p * gl.maximum(x, -1e30), 1)
    part = gl.sum(p, 1)
    l = l * fade + part
    return p, now, l, part, tile, spread, fade


@gluon.jit
def _next(
    acc, mass, p, m, l, part, tile, spread, since_m, since_l, q, k_s, v_s, e_s, k_full, k_empty, v_full, v_empty, j,
    first_row, op, to, sums, member, borders, f_before, f_now, b, h, value, group, coef, lost, c_now, g_now,
    EDGE: gl.constexpr, TOP: gl.constexpr, ENTROPY: gl.constexpr, MAP: gl.constexpr, BIASED: gl.constexpr,
    BN: gl.constexpr, D: gl.constexpr, S: gl.constexpr, STAGES: gl.constexpr, WGS: gl.constexpr, S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr, E_LAYOUT: gl.constexpr, LOG2E: gl.constexpr,
):  # fmt: skip
    """Multiply q with tile j, and at the same time the weights of tile j - 1 with their values."""
    stage = j % STAGES
    before = (j - 1) % STAGES
    if borders is not None:
        # load one step ahead; waiting for the load here would cost a fifth
        f_next = gl.load(borders + j + 1)
        if f_before != 0:
            mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)
            mass = add_mixed_mass(mass, p, e_s.index(before).reshape([BN, S]), since_m, m, E_LAYOUT)
            since_m, since_l = m, l
        if f_now != 0:
            mass = add_stretch_mass(mass, since_m, since_l, m, l, member + (j * BN - 1) * S, S, E_LAYOUT)
            since_m, since_l = m, l
        f_before, f_now = f_now, f_next
    c_next, g_next = c_now, g_now
    if BIASED:
        c_next = gl.load(value + j + 1)
        if group is not None:
            g_next = gl.load(group + j + 1)
    mbarrier.wait(k_full.index(stage), (j // STAGES) & 1)
    zero = gl.zeros([64, BN], gl.float32, S_LAYOUT)
    x = warpgroup_mma(
        q, k_s.index(stage).reshape([BN, D]).permute((1, 0)), warpgroup_mma_init(zero), use_acc=False, is_async=True
    )
    if MAP:
        # at this point the store costs half as much as after the next product starts, or before this one does
        store_tile_sum(sums, j - 1, m, part, S_LAYOUT, WGS)
    mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_s.index(before).reshape([BN, D]), warpgroup_mma_init(acc), is_async=True)
    if S > 0 and borders is None:
        p_e = gl.convert_layout(p, gl.DotOperandLayout(0, E_LAYOUT, 2))
        mass = warpgroup_mma(p_e, e_s.index(before).reshape([BN, S]), warpgroup_mma_init(mass), is_async=True)
        x = warpgroup_mma_wait(2, deps=[x])
    else:
        x = warpgroup_mma_wait(1, deps=[x])
    mbarrier.arrive(k_empty.index(stage))
    scale, shift = op.scale, None
    if BIASED:
        x, scale, shift = add_tile_bias(x, c_now, g_now, coef, lost, j * BN, op, b, h, BN, S_LAYOUT, LOG2E)
    weight, m, l, part, tile, spread, fade = _softmax(
        x, m, l, tile, spread, scale, shift, j * BN, first_row, op, EDGE, TOP, ENTROPY, BN, S_LAYOUT
    )
    if S > 0 and borders is None:
        acc, mass = warpgroup_mma_wait(0, deps=[acc, mass, p, p_e])[:2]
        mass = mass * gl.convert_layout(fade, gl.SliceLayout(1, E_LAYOUT))[:, None]
    else:
        acc, _ = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(before))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
    p = gl.convert_layout(weight.to(to.out.dtype.element_ty), gl.DotOperandLayout(0, O_LAYOUT, 2))
    return acc, mass, p, m, l, part, tile, spread, since_m, since_l, f_before, f_now, c_next, g_next


@gluon.jit
def _rows_of(
    i: gl.constexpr, q_s, k_s, v_s, e_s, q_full, k_full, k_empty, v_full, v_empty, b, h, first_row, tiles, full, op, to,
    sets, shifts,
    TOP: gl.constexpr, ENTROPY: gl.constexpr, MAP: gl.constexpr, BIASED: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, S: gl.constexpr, STAGES: gl.constexpr, WGS: gl.constexpr, LOG2E: gl.constexpr,
):  # fmt: skip
    """Process 64 rows of the tile, from the first key to the last that they see."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    E_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    VECTOR: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    first_row = first_row + 64 * i
    row = first_row + gl.arange(0, 64, VECTOR)
    inside = row < op.n_q
    line_of = (b * op.heads + h).to(gl.int64) * op.n_q + row
    m = gl.full([64], float("-inf"), gl.float32, VECTOR)
    l = gl.full([64], 0.0, gl.float32, VECTOR)
    spread = gl.full([64], 0.0, gl.float32, VECTOR)
    tile = gl.full([64], NO_TILE, gl.int32, VECTOR)
    acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
    mass = gl.zeros([64, 16], gl.float32, E_LAYOUT)
    sums = to.lse
    if MAP:
        # a multiprocessor runs one program at a time, so the scratch memory is small and stays in the cache
        sums = to.scratch + multiprocessor().to(gl.int64) * to.tiles * (64 * WGS) + 64 * i
    # masses on spans: the maximum and the sum at the last update
    since_m, since_l = m, l
    member, borders = sums, None
    f_before, f_now = 0, 0
    if S > 0:
        member = sets.member + (b.to(gl.int64) * sets.b + (h // op.group).to(gl.int64) * sets.g) * S
        if sets.borders is not None:
            borders = sets.borders + b * sets.border_b
            f_before = gl.load(borders)
            f_now = gl.load(borders + 1)
    value, group = None, None
    coef, lost = l, 0
    c_now, g_now, c_first, g_first = 0.0, 0, 0.0, 0
    if BIASED:
        value = shifts.value + (b * op.heads + h) * shifts.each
        c_first = gl.load(value)
        c_now = gl.load(value + 1)
        if op.row_coef is not None:
            group = shifts.group + (b * op.heads + h) * shifts.each
            g_first = gl.load(group)
            g_now = gl.load(group + 1)
            coef_at = op.row_coef + b.to(gl.int64) * op.coef_b + h.to(gl.int64) * op.coef_h
            coef = gl.load(coef_at + row, mask=inside, other=0.0) * LOG2E
            lost = has_dominant_bias(coef)
    mbarrier.wait(q_full, 0)
    q = q_s.index(i).reshape([64, D])
    mbarrier.wait(k_full.index(0), 0)
    x = warpgroup_mma(
        q, k_s.index(0).reshape([BN, D]).permute((1, 0)), gl.zeros([64, BN], gl.float32, S_LAYOUT), use_acc=False
    )
    mbarrier.arrive(k_empty.index(0))
    scale, shift = op.scale, None
    if BIASED:
        x, scale, shift = add_tile_bias(x, c_first, g_first, coef, lost, 0, op, b, h, BN, S_LAYOUT, LOG2E)
    weight, m, l, part, tile, spread, _ = _softmax(
        x, m, l, tile, spread, scale, shift, 0, first_row, op, True, TOP, ENTROPY, BN, S_LAYOUT
    )
    p = gl.convert_layout(weight.to(to.out.dtype.element_ty), gl.DotOperandLayout(0, O_LAYOUT, 2))
    for j in range(1, full):
        acc, mass, p, m, l, part, tile, spread, since_m, since_l, f_before, f_now, c_now, g_now = _next(
            acc, mass, p, m, l, part, tile, spread, since_m, since_l, q, k_s, v_s, e_s, k_full, k_empty, v_full,
            v_empty, j, first_row, op, to, sums, member, borders, f_before, f_now, b, h, value, group, coef, lost,
            c_now, g_now,
            False, TOP, ENTROPY, MAP, BIASED, BN, D, S, STAGES, WGS, S_LAYOUT, O_LAYOUT, E_LAYOUT, LOG2E,
        )  # fmt: skip
    for j in range(gl.maximum(full, 1), tiles):
        acc, mass, p, m, l, part, tile, spread, since_m, since_l, f_before, f_now, c_now, g_now = _next(
            acc, mass, p, m, l, part, tile, spread, since_m, since_l, q, k_s, v_s, e_s, k_full, k_empty, v_full,
            v_empty, j, first_row, op, to, sums, member, borders, f_before, f_now, b, h, value, group, coef, lost,
            c_now, g_now,
            True, TOP, ENTROPY, MAP, BIASED, BN, D, S, STAGES, WGS, S_LAYOUT, O_LAYOUT, E_LAYOUT, LOG2E,
        )  # fmt: skip
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_s.index(last).reshape([BN, D]), acc)
    dead = l == 0.0
    norm = gl.where(dead, 0.0, 1.0 / gl.where(dead, 1.0, l))
    if S > 0:
        if borders is not None:
            if f_before != 0:
                mass = add_mixed_mass(mass, p, e_s.index(last).reshape([BN, S]), since_m, m, E_LAYOUT)
                since_m, since_l = m, l
            final = gl.minimum(tiles * BN, op.n_k) - 1
            mass = add_stretch_mass(mass, since_m, since_l, m, l, member + final * S, S, E_LAYOUT)
        else:
            p_e = gl.convert_layout(p, gl.DotOperandLayout(0, E_LAYOUT, 2))
            mass = warpgroup_mma(p_e, e_s.index(last).reshape([BN, S]), mass)
        at_row = gl.convert_layout(line_of, gl.SliceLayout(1, E_LAYOUT))
        s = gl.arange(0, 16, gl.SliceLayout(0, E_LAYOUT))
        there = gl.convert_layout(inside, gl.SliceLayout(1, E_LAYOUT))[:, None] & (s < sets.number)[None, :]
        share = mass * gl.convert_layout(norm, gl.SliceLayout(1, E_LAYOUT))[:, None]
        gl.store(to.mass + at_row[:, None] * sets.number + s[None, :], share, mask=there)
    d = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    out_row = first_row + gl.arange(0, 64, gl.SliceLayout(1, O_LAYOUT))
    at = to.out + b.to(gl.int64) * to.out_b + h.to(gl.int64) * to.out_h
    at = at + out_row.to(gl.int64)[:, None] * to.out_n + d[None, :]
    result = acc * gl.convert_layout(norm, gl.SliceLayout(1, O_LAYOUT))[:, None]
    gl.store(at, result.to(to.out.dtype.element_ty), mask=(out_row < op.n_q)[:, None])
    gl.store(to.lse + line_of, gl.where(dead, float("-inf"), (m + gl.log2(l)) / LOG2E), mask=inside)
    if MAP:
        store_tile_sum(sums, tiles - 1, m, part, S_LAYOUT, WGS)
        whole = gl.where(dead | (row >= op.n_q), float("inf"), m + gl.log2(l))
        add_to_map(sums, whole, to, b, h, first_row, tiles, op, WGS)
    if TOP:
        gl.store(to.tile + line_of, gl.where(dead, NO_TILE, tile), mask=inside)
        gl.store(to.peak + line_of, norm, mask=inside)
    if ENTROPY:
        entropy = gl.where(dead, 0.0, gl.maximum((gl.log2(l) - spread * norm) / LOG2E, 0.0))
        gl.store(to.entropy + line_of, entropy, mask=inside)


@gluon.jit
def _hopper(
    op, to, sets, shifts, q_desc, k_desc, v_desc, e_desc, row_tiles,
    TOP: gl.constexpr, ENTROPY: gl.constexpr, MAP: gl.constexpr, BIASED: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, S: gl.constexpr, STAGES: gl.constexpr, WGS: gl.constexpr, LOG2E: gl.constexpr,
):  # fmt: skip
    # the order of tasks of `tiles.place`
    task = gl.program_id(0)
    each = row_tiles * op.group
    bg, rest = task // each, task % each
    b, g = bg // (op.heads // op.group), bg % (op.heads // op.group)
    h = g * op.group + rest % op.group
    first_row = (row_tiles - 1 - rest // op.group) * (64 * WGS)
    away = op.q_start - op.k_start
    # rows before the first key see no key, but still wait for a tile
    tiles = gl.maximum((gl.minimum(op.n_k, first_row + 64 * WGS + away) + BN - 1) // BN, 1)
    full = gl.minimum(op.n_k, first_row + 1 + away) // BN

    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [WGS, 1, 1, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], v_desc.layout)
    e_s = v_s
    bank = 0
    if S > 0:
        bank = (b * sets.b + g * sets.g) // op.n_k
        e_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, S], e_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), 1)
        mbarrier.init(v_full.index(i), 1)
        mbarrier.init(k_empty.index(i), WGS)
        mbarrier.init(v_empty.index(i), WGS)
    gl.warp_specialize([
        (_rows_of, (0, q_s, k_s, v_s, e_s, q_full, k_full, k_empty, v_full, v_empty, b, h, first_row, tiles, full,
                    op, to, sets, shifts, TOP, ENTROPY, MAP, BIASED, BN, D, S, STAGES, WGS, LOG2E)),
        (_rows_of, (1, q_s, k_s, v_s, e_s, q_full, k_full, k_empty, v_full, v_empty, b, h, first_row, tiles, full,
                    op, to, sets, shifts, TOP, ENTROPY, MAP, BIASED, BN, D, S, STAGES, WGS, LOG2E)),
        (_load, (q_desc, k_desc, v_desc, e_desc, q_s, k_s, v_s, e_s, q_full, k_full, k_empty, v_full, v_empty, b, h,
                 g, bank, first_row, tiles, BN, D, S, STAGES, WGS)),
    ], [4, 4], [240, 24])  # fmt: skip


MAX_SETS = 16
"""Largest number of key sets of one pass."""
SCRATCH_SLOTS = 144
"""Multiprocessors of the full chip, of which cards enable most. Each has its own memory for the sums of tiles."""


def tiling_of(call: Call) -> Tiling | None:
    """Return the tiling of this kernel for a call.

    Args:
        call: The attention call.

    Returns:
        Tiling | None: The tiling; None if `forward.py` has to serve the call.
    """
    q, k, v = call.q, call.k, call.v
    special = call.softcap, call.logit_scale, call.window, call.live, call.row_live, call.sinks, call.row_columns
    if not call.causal or call.mask is not None or any(x is not None for x in special) or not q.is_cuda:
        return None
    if call.row_coef is not None and call.row_coef.shape[-1] > 1:
        return None
    # later chips do not have these matrix instructions, and compiling for them would abort the process
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return None
    width = q.shape[-1]
    if q.dtype not in (torch.float16, torch.bfloat16) or width not in HOPPER_TILINGS or v.shape[-1] != width:
        return None
    return HOPPER_TILINGS[width] if all(is_copyable(x, width) for x in (q, k, v)) else None


def launch(op: Operands, to: Any, sets: KeySetOperand | None, tiles: Tiling, row_tiles: int) -> None:
    """Run the pass and write the results for which `to` has tensors.

    Args:
        op: The operands of the call.
        to: The `PassOutputs` of the pass.
        sets: The key sets; None for none.
        tiles: The tiling that `tiling_of` returned.
        row_tiles: Number of tiles of rows.
    """
    width = op.q.shape[-1]
    member = None
    if sets is not None:
        flat = sets.member.view(-1, *sets.member.shape[2:])
        layout = gl.NVMMASharedLayout(32, 16, rank=3)
        member = TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, tiles.keys, MAX_SETS], layout)
    _hopper[(row_tiles * op.batch * op.heads,)](
        op,
        to,
        sets,
        biases_by_tile(op, tiles.keys),
        *(_describe(x, n, width) for x, n in ((op.q, 64), (op.k, tiles.keys), (op.v, tiles.keys))),
        member,
        row_tiles,
        TOP=to.tile is not None,
        ENTROPY=to.entropy is not None,
        MAP=to.scratch is not None,
        BIASED=op.key_bias is not None or op.row_coef is not None,
        BN=tiles.keys,
        D=width,
        S=0 if sets is None else MAX_SETS,
        STAGES=tiles.stages,
        WGS=tiles.groups,
        LOG2E=LOG2E,
        num_warps=tiles.warps,
    )


def _describe(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Descriptor of x [b h n d] for the copy engine, with the layout that the matrix units read."""
    shape, strides, layout = list(x.shape), descriptor_strides(x, width), gl.NVMMASharedLayout(128, 16, rank=4)
    return TensorDescriptor(x, shape, strides, [1, 1, rows, width], layout)
