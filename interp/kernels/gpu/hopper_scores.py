"""Gluon: biases by tile, masses on spans and sums of tiles for the forward pass on Hopper.

A bias costs next to nothing in tiles whose keys all have the same bias, such as those between the ends of a span,
because it is added to the maximum of the row. Only in tiles where the bias changes is it added key by key.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false
# layouts and launches of triton are not typed

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from interp.kernels.gpu.tile_sizes import ceil_div
from interp.kernels.gpu.tiles import LOG2E, Operands

MIN_DOMINANT_BIAS = tl.constexpr(1e4)
"""A larger bias takes all the attention of its row. It must be added to the logits one by one, so that rounding removes
the differences between them as it does in the other kernels."""
TILES_PER_STRIP = gl.constexpr(32)
"""Tiles of keys whose sums are reduced at once."""
# renamed in triton 3.7
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


class TileBiases(NamedTuple):
    """The biases of a call for each tile of keys."""

    value: Tensor
    """float32 [b h tiles + 1], bias of all keys of a tile, in log2 units; NaN if its keys differ."""
    group: Tensor | None
    """int32 [b h tiles + 1], key group of the tile."""
    each: int
    """Number of tiles + 1."""


def biases_by_tile(op: Operands, size: int) -> TileBiases | None:
    """Compute the biases of a call for each tile of keys.

    Args:
        op: The operands of the call.
        size: Number of keys of a tile.

    Returns:
        TileBiases | None: The biases; None if the call has none.
    """
    if op.key_bias is None and op.row_coef is None:
        return None
    each = ceil_div(op.n_k, size) + 1
    shape = op.batch, op.heads, each
    value = torch.empty(shape, dtype=torch.float32, device=op.q.device)
    group = None if op.row_coef is None else torch.empty(shape, dtype=torch.int32, device=op.q.device)
    made = TileBiases(value, group, each)
    _biases_by_tile[(each, op.batch * op.heads)](op, made, BN=size, LOG2E=LOG2E, num_warps=1)
    return made


@triton.jit
def _biases_by_tile(op, to, BN: tl.constexpr, LOG2E: tl.constexpr):
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // op.heads, bh % op.heads
    key = tile * BN + tl.arange(0, BN)
    there = key < op.n_k
    value, differ = 0.0, 0
    if op.key_bias is not None:
        at = op.key_bias + b.to(tl.int64) * op.bias_b + h.to(tl.int64) * op.bias_h
        value = tl.load(at + tile * BN, mask=tile * BN < op.n_k, other=0.0)
        bias = tl.load(at + key, mask=there, other=0.0)
        differ = tl.max((there & (bias != value)).to(tl.int32), 0)
        if (tl.abs(value) > MIN_DOMINANT_BIAS) & (value > float("-inf")):
            differ = 1
    if op.row_coef is not None:
        at = op.key_group + b.to(tl.int64) * op.group_b + h.to(tl.int64) * op.group_h
        group = tl.load(at + tile * BN, mask=tile * BN < op.n_k, other=0)
        member = tl.load(at + key, mask=there, other=0)
        differ = tl.maximum(differ, tl.max((there & (member != group)).to(tl.int32), 0))
        tl.store(to.group + bh * to.each + tile, group)
    tl.store(to.value + bh * to.each + tile, tl.where(differ != 0, float("nan"), value * LOG2E))


@gluon.jit
def has_dominant_bias(coef):
    """Return whether the coefficient of at least one row is so large that rounding removes the logits."""
    return gl.max(((gl.abs(coef) > MIN_DOMINANT_BIAS) & (coef > float("-inf"))).to(gl.int32), 0)


@gluon.jit
def add_tile_bias(
    x, shift, group, coef, lost, start, op, b, h, BN: gl.constexpr, S_LAYOUT: gl.constexpr,
    LOG2E: gl.constexpr,
):  # fmt: skip
    """Return (x, scale, shift of each row) of a tile, whose logits in log2 units are x * scale + shift.

    `shift` is the bias of the whole tile, NaN if its keys differ. `group` is the key group of the whole tile, and
    `coef` the coefficient that each row adds to the keys of group 1. `lost` is 1 if it must be added key by key.
    """
    apart = shift != shift
    rows = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    if op.row_coef is not None:
        apart = apart | ((group == 1) & (lost != 0))
        rows = gl.where(group == 1, coef, rows)
    scale = gl.where(apart, 1.0, op.scale)
    rows = gl.where(apart, 0.0, rows + shift)
    if apart:
        key = start + gl.arange(0, BN, gl.SliceLayout(0, S_LAYOUT))
        there = key < op.n_k
        x = x * op.scale
        if op.key_bias is not None:
            at = op.key_bias + b.to(gl.int64) * op.bias_b + h.to(gl.int64) * op.bias_h
            x = x + (gl.load(at + key, mask=there, other=0.0) * LOG2E)[None, :]
        if op.row_coef is not None:
            at = op.key_group + b.to(gl.int64) * op.group_b + h.to(gl.int64) * op.group_h
            x = x + gl.where(gl.load(at + key, mask=there, other=0)[None, :] == 1, coef[:, None], 0.0)
    return x, scale, rows


@gluon.jit
def _rescaling(since_m, m):
    """Return the factor that turns weights relative to an earlier maximum into weights relative to this one."""
    return gl.where(since_m == float("-inf"), 0.0, gl.exp2(since_m - m))


@gluon.jit
def add_stretch_mass(mass, since_m, since_l, m, l, member, S: gl.constexpr, E_LAYOUT: gl.constexpr):
    """Add the masses of a stretch of tiles whose keys all belong to the same sets, from a difference of two sums."""
    fade = _rescaling(since_m, m)
    part = gl.convert_layout(gl.maximum(l - since_l * fade, 0.0), gl.SliceLayout(1, E_LAYOUT))
    whole = gl.load(member + gl.arange(0, S, gl.SliceLayout(0, E_LAYOUT))).to(gl.float32)
    return mass * gl.convert_layout(fade, gl.SliceLayout(1, E_LAYOUT))[:, None] + part[:, None] * whole[None, :]


@gluon.jit
def add_mixed_mass(mass, p, e, since_m, m, E_LAYOUT: gl.constexpr):
    """Add the masses of a tile in which membership changes, by a matrix product."""
    mass = mass * gl.convert_layout(_rescaling(since_m, m), gl.SliceLayout(1, E_LAYOUT))[:, None]
    return warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, E_LAYOUT, 2)), e, mass)


@gluon.jit
def multiprocessor():
    """Return the number of the multiprocessor that runs this program."""
    return gl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r,r", [gl.program_id(0)], gl.int32, False, 1)


@gluon.jit
def store_tile_sum(sums, j, m, part, S_LAYOUT: gl.constexpr, WGS: gl.constexpr):
    """Store the sum of the weights of tile j, in log2."""
    gl.store(sums + j * (64 * WGS) + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT)), m + gl.log2(part))


@gluon.jit
def add_to_map(sums, norm, to, b, h, first_row, tiles, op, WGS: gl.constexpr):
    """Reduce sums of tiles to sums of blocks, given `norm`, the log2 of the total of each row."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    norm = gl.convert_layout(norm, gl.SliceLayout(0, LAYOUT))
    line = ((b * op.heads + h).to(gl.int64) * to.map_n + first_row // (64 * WGS)) * to.map_m
    # wait for the stores of the other threads of this group
    _barrier()
    for start in range(0, tiles, TILES_PER_STRIP):
        tile = start + gl.arange(0, TILES_PER_STRIP, gl.SliceLayout(1, LAYOUT))
        there = tile < tiles
        stored = gl.load(sums + tile[:, None] * (64 * WGS) + row[None, :], mask=there[:, None], other=float("-inf"))
        # two groups of warps add to a block, and the sum is the same in either order
        gl.atomic_add(to.map + line + tile, gl.sum(gl.exp2(stored - norm[None, :]), 1), mask=there, sem="relaxed")
