"""Triton: key sets as one operand of a matrix product, so that a mass costs no work of its own per key."""

# pyright: reportCallIssue=false, reportArgumentType=false
# what triton's launches take is not typed

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.gpu.tile_sizes import pieces, power


class Sets(NamedTuple):
    """Up to 64 key sets side by side, soft ones and overlapping ones included."""

    member: Tensor
    """[b 1|g k S] in the dtype of v, padded with empty sets to S"""
    b: int
    g: int
    """steps between batch rows and kv heads, in keys"""
    number: int
    border_b: int
    borders: Tensor | None
    """int32 [b tiles + 1] 1 for a tile of keys in which, or before which, membership changes, and one 0; only of sets
    that are the same for all kv heads; None: not looked for"""


def as_operand(sets: Tensor, dtype: torch.dtype, tile: int | None = None) -> Sets:
    """The kernels' form of sets [b 1|g k s], of any strides; tile: keys of a tile, where borders are wanted.

    Borders make masses cheaper where the sets are spans, whose tiles seldom hold one.
    """
    b, g, m, count = sets.shape
    sets = sets.view(torch.uint8) if sets.dtype == torch.bool else sets
    width = max(16, power(count))
    member = torch.empty(b, g, m, width, dtype=dtype, device=sets.device)
    step = tile or 64
    tiles = pieces(m, step) + 1
    borders = None if tile is None else torch.empty(b, tiles, dtype=torch.int32, device=sets.device)
    if m:
        _operand[(tiles, b * g)](
            sets, *sets.stride(), member, borders, g, m, count, TILE=step, S=width, num_warps=4 if width <= 16 else 8
        )
    return Sets(member, m * g if b > 1 else 0, m if g > 1 else 0, count, tiles if b > 1 else 0, borders)


@triton.jit
def _operand(
    sets, s_b, s_g, s_k, s_s, member, borders, groups, m, number,
    TILE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    t, bg = tl.program_id(0), tl.program_id(1)
    b, g = bg // groups, bg % groups
    key = t * TILE + tl.arange(0, TILE)
    s = tl.arange(0, S)
    there = (key < m)[:, None] & (s < number)[None, :]
    at = sets + b.to(tl.int64) * s_b + g.to(tl.int64) * s_g + s[None, :].to(tl.int64) * s_s
    held = tl.load(at + key[:, None].to(tl.int64) * s_k, mask=there, other=0).to(tl.float32)
    to = member + bg.to(tl.int64) * m * S
    tl.store(to + key[:, None] * S + s[None, :], held.to(member.dtype.element_ty), mask=(key < m)[:, None])
    if borders is not None:
        before = tl.maximum(key - 1, 0)
        last = tl.load(at + before[:, None].to(tl.int64) * s_k, mask=there, other=0).to(tl.float32)
        changed = tl.max(tl.max((there & (held != last)).to(tl.int32), 1), 0)
        # sets of one kv head speak for all
        tl.store(borders + b * tl.num_programs(0) + t, changed, mask=g == 0)


@triton.jit
def by_product(mass, p, op, sets, b, g, key, S: tl.constexpr, PRECISION: tl.constexpr):
    """mass[row s] + sum over the keys of a tile of p[row key] E[key s]."""
    at = sets.member + (b.to(tl.int64) * sets.b + g.to(tl.int64) * sets.g) * S
    inside = (key >= 0) & (key < op.n_k)
    held = tl.load(at + key[:, None] * S + tl.arange(0, S)[None, :], mask=inside[:, None], other=0.0)
    return tl.dot(p, held.to(p.dtype), mass, input_precision=PRECISION)
