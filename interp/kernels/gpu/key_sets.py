"""Triton: key sets as an operand of a matrix product, which computes all masses of a tile at once."""

# pyright: reportCallIssue=false, reportArgumentType=false
# launches of triton kernels are not typed

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.gpu.tile_sizes import ceil_div, next_power_of_2


class KeySetOperand(NamedTuple):
    """Up to 64 key sets as one operand. Sets may overlap, and membership may be fractional."""

    member: Tensor
    """[b 1|g k S] in the dtype of v, padded to S with empty sets."""
    b: int
    """Stride between batch rows, in keys."""
    g: int
    """Stride between kv heads, in keys."""
    number: int
    """Number of sets, without padding."""
    border_b: int
    """Stride between batch rows of `borders`."""
    borders: Tensor | None
    """int32 [b tiles + 1], 1 for a tile of keys in which, or at whose start, membership changes, and a final 0. It is
    valid only for sets that are the same for all kv heads. None if it was not requested."""


def key_set_operand(sets: Tensor, dtype: torch.dtype, tile: int | None = None) -> KeySetOperand:
    """Convert key sets to the form that the kernels read.

    Borders make masses cheaper if the sets are spans, because then few tiles contain a border.

    Args:
        sets: [b 1|g k s], with any strides.
        dtype: The dtype of v.
        tile: Number of keys of a tile, to compute borders; None to leave them out.

    Returns:
        KeySetOperand: The operand.
    """
    b, g, m, count = sets.shape
    sets = sets.view(torch.uint8) if sets.dtype == torch.bool else sets
    width = max(16, next_power_of_2(count))
    member = torch.empty(b, g, m, width, dtype=dtype, device=sets.device)
    step = tile or 64
    tiles = ceil_div(m, step) + 1
    borders = None if tile is None else torch.empty(b, tiles, dtype=torch.int32, device=sets.device)
    if m:
        _operand[(tiles, b * g)](
            sets, *sets.stride(), member, borders, g, m, count, TILE=step, S=width, num_warps=4 if width <= 16 else 8
        )
    return KeySetOperand(member, m * g if b > 1 else 0, m if g > 1 else 0, count, tiles if b > 1 else 0, borders)


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
    weight = tl.load(at + key[:, None].to(tl.int64) * s_k, mask=there, other=0).to(tl.float32)
    to = member + bg.to(tl.int64) * m * S
    tl.store(to + key[:, None] * S + s[None, :], weight.to(member.dtype.element_ty), mask=(key < m)[:, None])
    if borders is not None:
        before = tl.maximum(key - 1, 0)
        last = tl.load(at + before[:, None].to(tl.int64) * s_k, mask=there, other=0).to(tl.float32)
        changed = tl.max(tl.max((there & (weight != last)).to(tl.int32), 1), 0)
        # the sets of the first kv head stand for those of all
        tl.store(borders + b * tl.num_programs(0) + t, changed, mask=g == 0)


@triton.jit
def add_masses(mass, p, op, sets, b, g, key, S: tl.constexpr, PRECISION: tl.constexpr):
    """Return mass[row s] + sum over the keys of a tile of p[row key] E[key s]."""
    at = sets.member + (b.to(tl.int64) * sets.b + g.to(tl.int64) * sets.g) * S
    inside = (key >= 0) & (key < op.n_k)
    member = tl.load(at + key[:, None] * S + tl.arange(0, S)[None, :], mask=inside[:, None], other=0.0)
    return tl.dot(p, member.to(p.dtype), mass, input_precision=PRECISION)
