"""Triton: key sets as one operand of a matrix product, so that a mass costs no work of its own per key."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Sets(NamedTuple):
    """Up to 64 key sets side by side, soft ones and overlapping ones included."""

    member: Tensor
    """[b 1|g k S] in the dtype of v, padded with empty sets to S"""
    b: int
    g: int
    """steps between batch rows and kv heads, in keys"""
    number: int
    borders: Tensor | None
    """int32 [b tiles + 1] 1 for a tile of keys in which, or before which, membership changes; None: not looked for"""


def as_operand(sets: Tensor, tile: int | None = None) -> Sets:
    """The kernels' form of sets [b 1|g k s]; tile: keys of a tile, where the sets are spans and borders are rare."""
    b, g, m, count = sets.shape
    width = max(16, 1 << (count - 1).bit_length())
    member = torch.nn.functional.pad(sets, (0, width - count)).contiguous()
    borders = None
    if tile is not None and m:
        changed = (sets[:, :, 1:] != sets[:, :, :-1]).any(-1).any(1)
        changes = torch.nn.functional.pad(changed, (1, 0)).cumsum(-1)
        # one tile more, since the kernel looks one ahead
        start = torch.arange(-(-m // tile) + 1, device=sets.device) * tile
        before, last = (start - 1).clamp(0, m - 1), (start + tile - 1).clamp(0, m - 1)
        borders = (changes[:, before] != changes[:, last]).to(torch.int32).contiguous()
    return Sets(member, m * g if b > 1 else 0, m if g > 1 else 0, count, borders)


@triton.jit
def by_product(mass, p, op, sets, b, g, key, S: tl.constexpr, PRECISION: tl.constexpr):
    """mass[row s] + sum over the keys of a tile of p[row key] E[key s]."""
    at = sets.member + (b.to(tl.int64) * sets.b + g.to(tl.int64) * sets.g) * S
    inside = (key >= 0) & (key < op.n_k)
    held = tl.load(at + key[:, None] * S + tl.arange(0, S)[None, :], mask=inside[:, None], other=0.0)
    return tl.dot(p, held.to(p.dtype), mass, input_precision=PRECISION)
