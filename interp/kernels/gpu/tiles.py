"""Operations on a tile of q k^T that all Triton kernels share: scale, soft-cap, biases and the mask.

Logits are in log2 units (multiplied by log2 e), so that the softmax needs only exp2 and one fused multiply-add. `row`
and `key` are indices of queries and keys that broadcast to the tile. Either of them may be along its rows.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# loops of triton kernels and triton.knobs are not typed

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.kernels.contract import MAX_BIAS, Call
from interp.kernels.gpu.tile_sizes import Tiling, next_power_of_2

LOG2E = math.log2(math.e)


class Operands(NamedTuple):
    """One attention call in the form that the kernels read. Absent fields are None and compile to nothing.

    A field such as `q_b` is a stride: of q, between prompts. `k_g` and `v_g` are strides between kv heads, `q_n`, `k_n`
    and `v_n` those between rows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_b: int
    q_h: int
    q_n: int
    k_b: int
    k_g: int
    k_n: int
    v_b: int
    v_g: int
    v_n: int
    batch: int
    heads: int
    group: int
    """Number of query heads of one kv head."""
    n_q: int
    n_k: int
    q_start: int
    k_start: int
    scale: float
    """Scale in log2 units, as is `cap`."""
    cap: float | None
    window: int | None
    logit_scale: Tensor | None
    """float32 [b h]."""
    sinks: Tensor | None
    """float32 [h], in natural units."""
    live: Tensor | None
    """uint8 [b k]."""
    first: Tensor | None
    """int32 [b], first live key."""
    clear: Tensor | None
    """int32 [b], index after the last key that is padding."""
    row_live: Tensor | None
    """uint8 [b q]."""
    row_clear: Tensor | None
    """int32 [b], index after the last row that is padding."""
    key_bias: Tensor | None
    """float32 [b h k], in natural units."""
    bias_b: int
    bias_h: int
    row_coef: Tensor | None
    """float32 [b h q s], in natural units."""
    coef_b: int
    coef_h: int
    key_group: Tensor | None
    """int32 [b 1|h k]."""
    group_b: int
    group_h: int
    rows: Tensor | None
    """int32 [q], column of each query if they are not consecutive."""


def operands(call: Call, q: Tensor | None = None) -> Operands:
    """Convert a call to the form that the kernels read.

    Only tensors that the kernels cannot read are copied, such as those with gaps in the last axis.

    Args:
        call: The attention call.
        q: Queries to use instead of those of the call.

    Returns:
        Operands: The operands.
    """
    q, k, v = (_dense(x) for x in (call.q if q is None else q, call.k, call.v))
    b, h, g, n, m = call.sizes
    device = q.device

    def small(x: Tensor | None, dtype: torch.dtype, *shape: int) -> Tensor | None:
        return None if x is None else x.to(device, dtype).expand(*shape).contiguous()

    bias = None if call.key_bias is None else call.key_bias.to(device, torch.float32).clamp(max=MAX_BIAS).contiguous()
    coef = None if call.row_coef is None else call.row_coef.to(device, torch.float32).clamp(max=MAX_BIAS).contiguous()
    group = None if coef is None else call.group_of_key.to(device, torch.int32).contiguous()

    first, clear = _live_range(call.live, m)

    def stride(x: Tensor | None, axis: int) -> int:
        return 0 if x is None or x.shape[axis] == 1 else x.stride(axis)

    return Operands(
        q=q,
        k=k,
        v=v,
        q_b=q.stride(0),
        q_h=q.stride(1),
        q_n=q.stride(2),
        k_b=k.stride(0),
        k_g=k.stride(1),
        k_n=k.stride(2),
        v_b=v.stride(0),
        v_g=v.stride(1),
        v_n=v.stride(2),
        batch=b,
        heads=h,
        group=h // g,
        n_q=n,
        n_k=m,
        q_start=call.q_start,
        k_start=call.k_start,
        scale=call.scale * LOG2E,
        cap=None if call.softcap is None else call.softcap * LOG2E,
        window=call.window,
        logit_scale=small(call.logit_scale, torch.float32, b, h),
        sinks=small(call.sinks, torch.float32, h),
        live=small(call.live, torch.uint8, b, m),
        first=first,
        clear=clear,
        row_live=small(call.row_live, torch.uint8, b, n),
        row_clear=_live_range(call.row_live, n)[1],
        key_bias=bias,
        bias_b=stride(bias, 0),
        bias_h=stride(bias, 1),
        row_coef=coef,
        coef_b=stride(coef, 0),
        coef_h=stride(coef, 1),
        key_group=group,
        group_b=stride(group, 0),
        group_h=stride(group, 1),
        rows=None if call.row_columns is None else call.row_columns.to(device, torch.int32).contiguous(),
    )


def _live_range(live: Tensor | None, m: int) -> tuple[Tensor | None, Tensor | None]:
    if live is None:
        return None, None
    if not m:
        zeros = torch.zeros(live.shape[0], dtype=torch.int32, device=live.device)
        return zeros, zeros
    place = torch.arange(m, device=live.device, dtype=torch.int32)
    first = torch.where(live, place, m).amin(1)
    return first, torch.where(live, -1, place).amax(1) + 1


def flags(call: Call) -> dict[str, Any]:
    """Return the compile-time constants of a call.

    Args:
        call: The attention call.

    Returns:
        dict: CAUSAL, PLAIN (no soft-cap, bias or logit scale), GROUPS (number of key groups), the head widths D of q
            and k and E of v, and the padded widths DP and EP.
    """
    plain = call.softcap is None and call.key_bias is None and call.row_coef is None and call.logit_scale is None
    groups = 0 if call.row_coef is None else call.row_coef.shape[-1]
    d, e = call.q.shape[-1], call.v.shape[-1]
    width = {"D": d, "DP": max(16, next_power_of_2(d)), "E": e, "EP": max(16, next_power_of_2(e))}
    return {"CAUSAL": call.causal, "PLAIN": plain, "GROUPS": groups, **width}


def _dense(x: Tensor) -> Tensor:
    x = x.detach()
    if INTERPRETED and x.dtype in (torch.float16, torch.bfloat16):
        # some versions of the interpreter multiply the bit patterns of bfloat16 numbers
        x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


INTERPRETED = bool(triton.knobs.runtime.interpret)


def is_copyable(x: Tensor, width: int) -> bool:
    """Return whether the copy engine of Hopper can read a tensor.

    Args:
        x: [b h n d], the tensor.
        width: Padded head width.

    Returns:
        bool: True if alignment, strides and width meet the requirements.
    """
    size = x.element_size()
    steps = [x.stride(i) * size for i in range(3) if x.shape[i] > 1]
    fits = x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(step % 16 == 0 and step > 0 for step in steps)
    return fits and x.shape[-1] == width and 0 not in x.shape and not INTERPRETED


def descriptor_strides(x: Tensor, width: int) -> list[int]:
    """Return the strides of a tensor for the copy engine.

    Args:
        x: [b h n d], the tensor.
        width: Head width. It replaces the stride of an axis of length 1, which may not be a multiple of 16 bytes.

    Returns:
        list[int]: Four strides.
    """
    return [*(x.stride(i) if x.shape[i] > 1 else width for i in range(3)), 1]


def descriptor(x: Tensor, rows: int, width: int) -> Any:
    """Create a descriptor for the copy engine of Hopper.

    Args:
        x: [b h n d], the tensor.
        rows: Rows of a tile.
        width: Padded head width.

    Returns:
        TensorDescriptor | None: The descriptor; None if the layout of the tensor does not allow one.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    if not is_copyable(x, width):
        return None
    return TensorDescriptor(x, list(x.shape), descriptor_strides(x, width), [1, 1, rows, width])


def descriptors(op: Operands, tiles: Tiling, known: dict[str, Any], out: bool) -> tuple[Any, Any, Any]:
    """Create descriptors of q, k and v.

    Args:
        op: The operands of the call.
        tiles: The tiling of the kernel.
        known: The compile-time constants of the call.
        out: Whether the output is computed, which needs v.

    Returns:
        tuple: Three descriptors, that of v None without output; None for all if one of them cannot be created.
    """
    if not tiles.descriptors or op.rows is not None:
        return None, None, None
    q = descriptor(op.q, tiles.rows, known["DP"])
    k = descriptor(op.k, tiles.keys, known["DP"])
    v = descriptor(op.v, tiles.keys, known["EP"])
    return (q, k, v if out else None) if None not in (q, k, v) else (None, None, None)


@triton.jit
def row_columns(op, row):
    """Return the column of each query; -1 past the end, where a causal call shows no key."""
    if op.rows is not None:
        column = tl.load(op.rows + row, mask=(row >= 0) & (row < op.n_q), other=-1)
    else:
        column = row + op.q_start
    return column


@triton.jit
def visible_keys(op, b, row, column, key, CAUSAL: tl.constexpr):
    """Return which keys each query may attend to, as a mask in the shape of the tile."""
    mask = (key >= 0) & (key < op.n_k) & (row >= 0) & (row < op.n_q)
    at = key + op.k_start
    if CAUSAL:
        mask = mask & (at <= column)
    if op.window is not None:
        mask = mask & (at > column - op.window)
    if op.live is not None:
        mask = mask & (tl.load(op.live + b.to(tl.int64) * op.n_k + key, mask=(key >= 0) & (key < op.n_k), other=0) != 0)
    if op.row_live is not None:
        there = (row >= 0) & (row < op.n_q)
        mask = mask & (tl.load(op.row_live + b.to(tl.int64) * op.n_q + row, mask=there, other=0) != 0)
    return mask


@triton.jit
def edit_logits(s, op, b, h, row, key, GROUPS: tl.constexpr, LOG2E: tl.constexpr):
    """Return logits in log2 units from the raw product: scale, logit_scale, softcap, key_bias, row_coef; no mask."""
    x = s * op.scale
    if op.logit_scale is not None:
        x = x * tl.load(op.logit_scale + b * op.heads + h)
    if op.cap is not None:
        # the approximate tanh of the hardware has an error of 1e-2 at a cap of 30
        x = op.cap * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E / op.cap))))
    if op.key_bias is not None:
        at = op.key_bias + b.to(tl.int64) * op.bias_b + h.to(tl.int64) * op.bias_h + key
        x = x + tl.load(at, mask=(key >= 0) & (key < op.n_k), other=0.0) * LOG2E
    if GROUPS > 0:
        member = op.key_group + b.to(tl.int64) * op.group_b + h.to(tl.int64) * op.group_h
        of = tl.load(member + key, mask=(key >= 0) & (key < op.n_k), other=0)
        at = op.row_coef + b.to(tl.int64) * op.coef_b + h.to(tl.int64) * op.coef_h + row.to(tl.int64) * GROUPS
        for i in tl.static_range(GROUPS):
            coef = tl.load(at + i, mask=(row >= 0) & (row < op.n_q), other=0.0)
            x = x + tl.where(of == i + 1, coef * LOG2E, 0.0)
    return x


@triton.jit
def queries(op, b, h, row, D: tl.constexpr, DP: tl.constexpr):
    """Load [row d] of q, zero outside."""
    d = tl.arange(0, DP)
    at = op.q + b.to(tl.int64) * op.q_b + h.to(tl.int64) * op.q_h + row.to(tl.int64)[:, None] * op.q_n + d[None, :]
    return tl.load(at, mask=((row >= 0) & (row < op.n_q))[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def keys(op, b, g, key, D: tl.constexpr, DP: tl.constexpr):
    """Load [key d] of k, zero outside."""
    d = tl.arange(0, DP)
    at = op.k + b.to(tl.int64) * op.k_b + g.to(tl.int64) * op.k_g + key.to(tl.int64)[:, None] * op.k_n + d[None, :]
    return tl.load(at, mask=((key >= 0) & (key < op.n_k))[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def values(op, b, g, key, E: tl.constexpr, EP: tl.constexpr):
    """Load [key e] of v, zero outside and for keys that are padding, because 0 * NaN would be NaN."""
    e = tl.arange(0, EP)
    there = (key >= 0) & (key < op.n_k)
    if op.live is not None:
        there = there & (tl.load(op.live + b.to(tl.int64) * op.n_k + key, mask=there, other=0) != 0)
    at = op.v + b.to(tl.int64) * op.v_b + g.to(tl.int64) * op.v_g + key.to(tl.int64)[:, None] * op.v_n + e[None, :]
    return tl.load(at, mask=there[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def place(op, task, row_tiles, BM: tl.constexpr):
    """Return (b, g, h, first row) of a task. Heads of one kv head are neighbours, so that its keys stay in the cache,
    and the longest rows come first."""
    each = row_tiles * op.group
    bg, rest = task // each, task % each
    b, g = bg // (op.heads // op.group), bg % (op.heads // op.group)
    return b, g, g * op.group + rest % op.group, (row_tiles - 1 - rest // op.group) * BM


@triton.jit
def extent(op, first_row, inside, column, BM: tl.constexpr):
    """Return the lowest and the highest column of a tile of rows, as indices of keys of the call."""
    if op.rows is not None:
        low = tl.min(tl.where(inside, column, 1 << 30), 0)
        high = tl.max(column, 0)
    else:
        low = tl.maximum(first_row, 0) + op.q_start
        high = tl.minimum(first_row + BM, op.n_q) - 1 + op.q_start
    return low - op.k_start, high - op.k_start


@triton.jit
def reach(op, b, low, high, shift, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """Return (lo, clear, full, hi): at least one row sees lo..hi, and every row sees all of clear..full. All but hi are
    starts of tiles."""
    lo, hi = 0, op.n_k
    clear, full = 0, op.n_k
    if CAUSAL:
        hi = tl.minimum(hi, high + 1)
        full = tl.minimum(full, low + 1)
    if op.window is not None:
        lo = tl.maximum(lo, low - op.window + 1)
        clear = tl.maximum(clear, high - op.window + 1)
    if op.live is not None:
        lo = tl.maximum(lo, tl.load(op.first + b))
        clear = tl.maximum(clear, tl.load(op.clear + b))
    lo = shift + (tl.maximum(lo - shift, 0) // BN) * BN
    clear = tl.maximum(tl.minimum(clear, hi), lo)
    clear = shift + (tl.maximum(clear - shift, 0) + BN - 1) // BN * BN
    full = tl.maximum(shift + (tl.maximum(full - shift, 0) // BN) * BN, clear)
    return lo, clear, full, hi
