"""Triton: masses on key sets, as a matrix product inside of the pass, or from running sums where the sets are spans.

The sets of a prompt are mostly spans: few tiles of keys hold a border, in all others every key belongs to the same
sets. There the mass of a whole stretch of tiles is a difference of two running sums of the softmax, which the pass
writes down before each tile with a border; those few tiles are computed once more, here, in float32.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# triton's launch options and powers of two are not typed

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.settings import Tiling
from interp.kernels.tiles import LOG2E, Operands, edited, extent, keys, queries, reach, row_columns, seen

SPARSE = 4
"""running sums are kept where at most one tile in so many has a border"""
BEYOND = 1 << 30


class Sets(NamedTuple):
    """Key sets as one operand of a matrix product."""

    member: Tensor
    """[b 1|g k S] in the dtype of v, padded with empty sets to S"""
    b: int
    g: int
    """steps between batch rows and kv heads, in keys"""
    number: int
    slots: Tensor | None
    """int32 [b tiles], where membership seldom changes: the place of the running sum that is kept before each tile"""


@triton.jit
def by_product(mass, p, op, sets, b, g, key, S: tl.constexpr, PRECISION: tl.constexpr):
    """mass + p E"""
    at = sets.member + (b.to(tl.int64) * sets.b + g.to(tl.int64) * sets.g) * S
    there = ((key >= 0) & (key < op.n_k))[:, None]
    held = tl.load(at + key[:, None] * S + tl.arange(0, S)[None, :], mask=there, other=0.0)
    return tl.dot(p, held.to(p.dtype), mass, input_precision=PRECISION)


def as_operand(sets: Tensor) -> Sets:
    b, g, m, count = sets.shape
    member = torch.nn.functional.pad(sets, (0, max(16, triton.next_power_of_2(count)) - count)).contiguous()
    return Sets(member, m * g if b > 1 else 0, m if g > 1 else 0, count, None)


@dataclass(frozen=True, eq=False)
class Borders:
    """The tiles of keys in which, or before which, membership changes."""

    slots: Tensor
    """int32 [b tiles + 1] number of the border that lies in a tile, -1 for none"""
    starts: Tensor
    """int32 [b n] first key of each such tile, in order; BEYOND past the last"""

    @classmethod
    def of(cls, sets: Sets, op: Operands, size: int, tiles: int, shift: Tensor | None) -> "Borders | None":
        """The borders of tiles of `size` keys, or None where they are too many."""
        member = sets.member
        b, m = member.shape[0], member.shape[2]
        if not m:
            return None
        changed = (member[:, :, 1:] != member[:, :, :-1]).any(-1).any(1)
        count = torch.nn.functional.pad(changed.to(torch.int32), (1, 0)).cumsum(-1)
        # one tile more, since kernels look one ahead
        start = torch.arange(tiles + 1, device=member.device)[None] * size
        start = start.expand(b, -1) if shift is None else start + shift[:, None]
        before, last = (start - 1).clamp(0, m - 1), (start + size - 1).clamp(0, m - 1)
        border = count.gather(1, before) != count.gather(1, last)
        most = int(border.sum(1).max())
        if SPARSE * most > tiles:
            return None
        slots = torch.where(border, border.cumsum(1) - 1, -1).to(torch.int32)
        order = torch.where(border, start, BEYOND).sort(dim=1).values[:, : max(1, most)]
        return cls(slots.contiguous(), order.to(torch.int32).contiguous())


@triton.jit
def _between(
    op, lse, sums, width, sets, starts, count, shifts, row_shift, row_tiles,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    bh = task // row_tiles
    b, h = bh // op.heads, bh % op.heads
    g = h // op.group
    first_row = (task % row_tiles) * BM
    shift = 0
    if row_shift is not None:
        first_row += tl.load(row_shift + b)
        shift = tl.load(shifts + b)
    row = first_row + tl.arange(0, BM)
    inside = (row >= 0) & (row < op.n_q)
    column = row_columns(op, row)
    low, high = extent(op, first_row, inside, column, BM)
    lo, _, _, hi = reach(op, b, low, high, shift, BN, CAUSAL)
    at = bh.to(tl.int64) * op.n_q + row
    # rows that see nothing have a log-sum-exp of +inf here
    norm = tl.load(lse + at, mask=inside, other=float("inf"))
    q = queries(op, b, h, row, D, DP)
    s = tl.arange(0, S)
    member = sets.member + (b.to(tl.int64) * sets.b + g.to(tl.int64) * sets.g) * S
    mass = tl.zeros([BM, S], tl.float32)
    done = tl.zeros([BM], tl.float32)
    for i in range(count):
        start = tl.load(starts + b * count + i)
        if (start >= lo) & (start < hi):
            upto = tl.exp2(tl.load(sums + at * width + i, mask=inside, other=float("-inf")) - norm)
            whole = tl.load(member + tl.maximum(start - 1, 0) * S + s).to(tl.float32)
            mass += tl.maximum(upto - done, 0.0)[:, None] * whole[None, :]
            key = start + tl.arange(0, BN)
            k = keys(op, b, g, key, D, DP)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if PLAIN:
                x = x * op.scale
            else:
                x = edited(x, op, b, h, row[:, None], key[None, :], GROUPS, LOG2E)
            x = tl.where(seen(op, b, row[:, None], column[:, None], key[None, :], CAUSAL), x, float("-inf"))
            p = tl.exp2(x - norm[:, None])
            mass = by_product(mass, p, op, sets, b, g, key, S, "tf32x3")
            done = upto + tl.sum(p, 1)
    total = tl.where(norm == float("inf"), 0.0, 1.0)
    if op.sinks is not None:
        total -= tl.exp2(tl.load(op.sinks + h) * LOG2E - norm)
    last = tl.minimum(tl.maximum(hi - 1, 0), op.n_k - 1)
    whole = tl.load(member + last * S + s).to(tl.float32)
    mass += tl.maximum(total - done, 0.0)[:, None] * whole[None, :]
    tl.store(sums + at[:, None] * width + s[None, :], mass, mask=inside[:, None] & (s < sets.number)[None, :])


def between(
    op: Operands, lse: Tensor, sums: Tensor, sets: Sets, borders: Borders, shifts: tuple[Tensor | None, Tensor | None],
    known: dict[str, Any], tiles: Tiling, row_tiles: int,
) -> None:  # fmt: skip
    """Masses on spans, written in place of the running sums that the pass left.

    mass[b h q s] = sum over stretches of (upto[next border] - upto[border]) member[b k s], and over the tiles with a
    border of p member, upto = exp2(running sum - lse). lse: [b h q], -inf on dead rows, and sums: [b h q n], n at
    least the sets and the borders, both float32. The tiling and shifts must be those of the pass.
    Cannot show: masses far below 2^-24 of a row beside large ones, since they are differences.
    """
    norm = (lse * LOG2E).masked_fill(~lse.isfinite(), torch.inf)
    count = borders.starts.shape[1]
    _between[(row_tiles * op.batch * op.heads,)](
        op,
        norm,
        sums,
        sums.shape[-1],
        sets,
        borders.starts,
        count,
        shifts[1],
        shifts[0],
        row_tiles,
        **known,
        S=sets.member.shape[-1],
        BM=tiles.rows,
        BN=tiles.keys,
        PRECISION=tiles.precision,
        LOG2E=LOG2E,
        num_warps=tiles.warps,
        num_stages=1,
    )
