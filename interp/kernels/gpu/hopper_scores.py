"""Gluon: what Hopper's pass carries beside attention itself: biases by tile, masses on spans, sums of tiles for blocks.

A bias costs next to nothing where all keys of a tile have the same one, as they do between the ends of a span: it joins
the maximum of the row. Only tiles in which it changes take it key by key.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false
# neither layouts nor launches of triton are typed

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from interp.kernels.gpu.tile_sizes import pieces
from interp.kernels.gpu.tiles import LOG2E, Operands

LARGE = tl.constexpr(1e4)
"""a bias past it takes the whole row, and logits must be added to it one by one to be lost in it"""
STRIP = gl.constexpr(32)
"""tiles of keys whose sums are finished at once"""
# renamed in triton 3.7
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


class Shifts(NamedTuple):
    """The biases of a call by tile of keys."""

    value: Tensor
    """float32 [b h tiles + 1] what the logits of all keys of a tile get, in log2 units; nan where keys differ"""
    group: Tensor | None
    """int32, the same shape: the key group of the tile"""
    each: int
    """tiles + 1"""


def by_tile(op: Operands, size: int) -> Shifts | None:
    """The biases of a call by tiles of `size` keys; None where it has none."""
    if op.key_bias is None and op.row_coef is None:
        return None
    each = pieces(op.n_k, size) + 1
    shape = op.batch, op.heads, each
    value = torch.empty(shape, dtype=torch.float32, device=op.q.device)
    group = None if op.row_coef is None else torch.empty(shape, dtype=torch.int32, device=op.q.device)
    made = Shifts(value, group, each)
    _by_tile[(each, op.batch * op.heads)](op, made, BN=size, LOG2E=LOG2E, num_warps=1)
    return made


@triton.jit
def _by_tile(op, to, BN: tl.constexpr, LOG2E: tl.constexpr):
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
        if (tl.abs(value) > LARGE) & (value > float("-inf")):
            differ = 1
    if op.row_coef is not None:
        at = op.key_group + b.to(tl.int64) * op.group_b + h.to(tl.int64) * op.group_h
        group = tl.load(at + tile * BN, mask=tile * BN < op.n_k, other=0)
        member = tl.load(at + key, mask=there, other=0)
        differ = tl.maximum(differ, tl.max((there & (member != group)).to(tl.int32), 0))
        tl.store(to.group + bh * to.each + tile, group)
    tl.store(to.value + bh * to.each + tile, tl.where(differ != 0, float("nan"), value * LOG2E))


@gluon.jit
def large(coef):
    """Whether some row adds so much that single logits are lost in it."""
    return gl.max(((gl.abs(coef) > LARGE) & (coef > float("-inf"))).to(gl.int32), 0)


@gluon.jit
def shifted(
    x, shift, group, coef, lost, start, op, b, h, BN: gl.constexpr, S_LAYOUT: gl.constexpr,
    LOG2E: gl.constexpr,
):  # fmt: skip
    """(x, scale, shift of each row) of a tile, whose logits in log2 units are x * scale + shift.

    shift: of the whole tile, nan where its keys differ; group: of the whole tile, for `coef`, what each row adds to
    keys of group 1; lost: whether that must be added key by key.
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
def _moved(since_m, m):
    """What turns weights relative to an earlier maximum into weights relative to this one."""
    return gl.where(since_m == float("-inf"), 0.0, gl.exp2(since_m - m))


@gluon.jit
def stretch(mass, since_m, since_l, m, l, member, S: gl.constexpr, E_LAYOUT: gl.constexpr):
    """Masses of a stretch of tiles whose keys all belong to the same sets: a difference of two sums."""
    fade = _moved(since_m, m)
    part = gl.convert_layout(gl.maximum(l - since_l * fade, 0.0), gl.SliceLayout(1, E_LAYOUT))
    whole = gl.load(member + gl.arange(0, S, gl.SliceLayout(0, E_LAYOUT))).to(gl.float32)
    return mass * gl.convert_layout(fade, gl.SliceLayout(1, E_LAYOUT))[:, None] + part[:, None] * whole[None, :]


@gluon.jit
def mixed(mass, p, e, since_m, m, E_LAYOUT: gl.constexpr):
    """Masses of a tile in which membership changes: a product."""
    mass = mass * gl.convert_layout(_moved(since_m, m), gl.SliceLayout(1, E_LAYOUT))[:, None]
    return warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, E_LAYOUT, 2)), e, mass)


@gluon.jit
def multiprocessor():
    """The number of the multiprocessor that runs this program."""
    return gl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r,r", [gl.program_id(0)], gl.int32, False, 1)


@gluon.jit
def note(sums, j, m, part, S_LAYOUT: gl.constexpr, WGS: gl.constexpr):
    """Keep the sum of the weights of tile j, in log2."""
    gl.store(sums + j * (64 * WGS) + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT)), m + gl.log2(part))


@gluon.jit
def to_map(sums, norm, to, b, h, first_row, tiles, op, WGS: gl.constexpr):
    """Sums of tiles to sums of blocks, once the log2 of the total of each row, `norm`, is known."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    norm = gl.convert_layout(norm, gl.SliceLayout(0, LAYOUT))
    line = ((b * op.heads + h).to(gl.int64) * to.map_n + first_row // (64 * WGS)) * to.map_m
    # what other threads of this group wrote
    _barrier()
    for start in range(0, tiles, STRIP):
        tile = start + gl.arange(0, STRIP, gl.SliceLayout(1, LAYOUT))
        there = tile < tiles
        held = gl.load(sums + tile[:, None] * (64 * WGS) + row[None, :], mask=there[:, None], other=float("-inf"))
        # two groups of warps add to a block, in either order the same
        gl.atomic_add(to.map + line + tile, gl.sum(gl.exp2(held - norm[None, :]), 1), mask=there, sem="relaxed")
