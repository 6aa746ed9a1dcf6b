"""Attention with reductions in O(n * block) memory, plain torch, any device: a block of rows at a time, all its keys.

A block's rows are complete, so every reduction comes out of the one pass over q k^T, columns included.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interp.kernels import naive
from interp.kernels.accumulators import BITS, TILE, Block, Workspace, accumulator, join
from interp.kernels.contract import Call, Mass, Request, Result, Rows

BLOCK_ELEMENTS = 1 << 21
"""scores held at once: 8 MiB in float32"""


def attend(
    call: Call,
    requests: tuple[Request, ...] = (),
    queries: Tensor | None = None,
    out: bool = True,
    block: int = BLOCK_ELEMENTS,
) -> Result:
    """Attention and its reductions, one block of rows after the other.

    Equal to `naive.attend` up to rounding: out[b h q d] = sum over k of softmax(logits) v, statistics in float32
    (float64 where q is). Memory: a few times `block` scores, the outputs, and float32 copies of k and v.
    Where gradients are wanted they flow into `out`; the reductions carry none.
    """
    if 0 in (*call.q.shape, *call.k.shape):
        # nothing to cut into blocks
        return naive.attend(call, requests, queries, out)
    if out and queries is not None:
        # some rows are read, all are computed: the reductions run over their own rows
        plain = attend(call, block=block)
        return Result(plain.out, attend(call, requests, queries, out=False, block=block).values)
    chosen = {i: request for i, request in enumerate(requests) if isinstance(request, Rows)}
    values: list[Any] = [None] * len(requests)
    for i, request in chosen.items():
        values[i] = _full_rows(call, request, block)
    rest = tuple(request for i, request in enumerate(requests) if i not in chosen)
    if queries is not None:
        call = call.for_queries(queries)
    result = None
    if out and not rest and call.softcap is None and call.sinks is None and call.q.dtype == call.dtype:
        result = _by_sdpa(call, block)
    elif rest or out:
        result, found = _by_groups(call, rest, queries, out, block)
        for i, value in zip((i for i in range(len(requests)) if i not in chosen), found, strict=True):
            values[i] = value
    return Result(result, tuple(values))


def _by_sdpa(call: Call, size: int) -> Tensor:
    """out [b h q e] where nothing is read: torch's own attention, biases as its mask, some rows at a time."""
    b, h, g, n, n_keys = call.sizes
    q = call.q if call.logit_scale is None else call.q * call.logit_scale.to(call.dtype).expand(b, h)[:, :, None, None]
    outs = []
    for rows in torch.arange(n).split(max(1, size // max(1, b * h * n_keys))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        mask = call.bias(part).to(call.dtype) if call.add_key_bias else call.q.new_zeros(1, 1, 1, 1)
        if not call.open:
            mask = torch.where(call.sight(part), mask, -torch.inf)
        dead = (mask == -torch.inf).all(-1, keepdim=True)
        blind = bool(dead.any())
        if blind:
            # a row that sees nothing would be nan
            mask = mask.masked_fill(dead, 0.0)
        mask = mask.expand(b, h, len(rows), n_keys)
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, part], call.k, call.v, attn_mask=mask, scale=call.scale, enable_gqa=g != h
        )
        outs.append(out.masked_fill(dead, 0.0) if blind else out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _by_groups(
    call: Call, requests: tuple[Request, ...], queries: Tensor | None, out: bool, size: int
) -> tuple[Tensor | None, list[Any]]:
    """One kv head after the other where the call fills more than a block: fewer, taller products of matrices."""
    b, h, g, n, n_keys = call.sizes
    parts = [call] if b * h * n * n_keys <= size else list(groups(call))
    space = Workspace(call.dtype, call.q.device, min(max(size, b * h // g * n_keys), b * h * n * n_keys))
    grad = torch.is_grad_enabled()
    # rows of all heads side by side, as the model takes them; gradients need pieces that are joined
    whole = None if grad or not out else call.v.new_empty(b, n, h, call.v.shape[-1]).transpose(1, 2)
    places = [None] * len(parts) if whole is None else whole.chunk(len(parts), 1)
    pairs = zip(parts, places, strict=True)
    found = [_sweep(part, requests, queries, out, size, space, place) for part, place in pairs]
    if out and whole is None:
        whole = torch.cat([result for result, _ in found if result is not None], 1)
    if len(parts) == 1:
        return whole, found[0][1]
    values = zip(*(values for _, values in found), strict=True)
    return whole, [join(request, list(each)) for request, each in zip(requests, values, strict=True)]


def groups(call: Call) -> Iterator[Call]:
    """The call of each kv head and the query heads that share it, as views."""
    h, g = call.sizes[1:3]

    def pick(x: Tensor | None, axis: int, heads: slice) -> Tensor | None:
        return x if x is None or x.shape[axis] == 1 else x.movedim(axis, 0)[heads].movedim(0, axis)

    for i in range(g):
        heads, kv = slice(i * (h // g), (i + 1) * (h // g)), slice(i, i + 1)
        yield replace(
            call,
            q=call.q[:, heads],
            k=call.k[:, kv],
            v=call.v[:, kv],
            sinks=pick(call.sinks, 0, heads),
            mask=pick(call.mask, 1, heads),
            key_bias=pick(call.key_bias, 1, heads),
            row_coef=pick(call.row_coef, 1, heads),
            key_group=pick(call.key_group, 1, heads) if getattr(call.key_group, "ndim", 0) == 3 else call.key_group,
            logit_scale=pick(call.logit_scale, -1, heads),
        )


def _sweep(
    call: Call,
    requests: tuple[Request, ...],
    queries: Tensor | None,
    out: bool,
    size: int,
    space: Workspace,
    place: Tensor | None,
) -> tuple[Tensor | None, list[Any]]:
    """The output, written to `place` where there is one, and the value of each request."""
    b, h, g = call.sizes[:3]
    steps = [accumulator(request, call, queries) for request in requests]
    scorer = Scorer.of(call, requests, space)
    values, columns = scorer.v, {}
    if place is not None:
        # a key set is one more column of v: its mass costs no pass of its own
        for request in requests:
            if isinstance(request, Mass) and not request.by_value:
                sets = request.sets.to(call.dtype).transpose(-1, -2)[:, None].expand(b, g, -1, -1)
                columns[id(request)] = slice(values.shape[-1], values.shape[-1] + sets.shape[-1])
                values = torch.cat([values, sets], -1)
    outs = []
    for rows in scorer.blocks(size):
        with torch.set_grad_enabled(torch.is_grad_enabled() and out):
            block = scorer.block(rows)
            if out:
                product = block.weight.view(b, g, -1, block.weight.shape[-1]) @ values[:, :, block.keys]
                product = product.view(b, h, rows.stop - rows.start, -1)
                read = product[..., : scorer.v.shape[-1]]
                if place is None:
                    outs.append((read / block.denominator).to(call.v.dtype))
                else:
                    torch.div(read, block.denominator, out=place[:, :, rows])
                block.sums = {name: product[..., column] for name, column in columns.items()}
        with torch.no_grad():
            for add, _ in steps:
                add(block)
    if out and place is None:
        place = torch.cat(outs, 2) if outs else call.v.new_zeros(b, h, 0, call.v.shape[-1])
    return place, [value() for _, value in steps]


@dataclass(eq=False)
class Scorer:
    """Makes the blocks of one call: logits, softmax, and which keys a block of rows can see at all."""

    call: Call
    q: Tensor
    k: Tensor
    v: Tensor
    value_norm: Tensor | None
    dead_keys: slice
    """the narrowest range that holds every padded key"""
    space: Workspace

    @classmethod
    def of(cls, call: Call, requests: tuple[Request, ...], space: Workspace) -> "Scorer":
        b, h, g = call.sizes[:3]
        q = call.q.to(call.dtype) * (call.scale * BITS)
        if call.logit_scale is not None:
            q = q * call.logit_scale.to(call.dtype).expand(b, h)[:, :, None, None]
        v = call.v.to(call.dtype)
        norm = None
        if any(getattr(request, "by_value", False) for request in requests):
            norm = v.norm(dim=-1).repeat_interleave(h // g, 1)[:, :, None]
        dead = slice(0, 0)
        if call.live is not None:
            padded = (~call.live).any(0).nonzero()
            dead = slice(int(padded[0]), int(padded[-1]) + 1) if len(padded) else dead
        return cls(call, q, call.k.to(call.dtype), v, norm, dead, space)

    def blocks(self, size: int) -> list[slice]:
        """Ranges of rows whose scores come to about `size`; up to four times as many rows where few keys are seen."""
        b, h, _, n, n_keys = self.call.sizes
        least = max(1, size // max(1, b * h * n_keys))
        found, start = [], 0
        while start < n:
            keys = self.reach(slice(start, min(n, start + 4 * least)))
            rows = size // max(1, b * h * (keys.stop - keys.start))
            stop = min(n, start + min(max(least, rows), 4 * least))
            found.append(slice(start, stop))
            start = stop
        return found

    def reach(self, rows: slice) -> slice:
        """The range of keys that some row of the block may see, widened to whole tiles where there are as many keys."""
        call, n_keys = self.call, self.k.shape[2]
        columns = call.rows[rows] - call.k_start
        low, high = 0, n_keys
        if call.causal:
            high = min(n_keys, int(columns.max()) + 1)
        if call.window is not None:
            low = max(0, int(columns.min()) - call.window + 1)
        if high <= low:
            return slice(0, 0)
        return slice(low - low % TILE, min(n_keys, high + -high % TILE))

    def logits(self, rows: slice, keys: slice, hidden: float) -> Tensor:
        """[b h r k] logits in bits with `hidden` wherever a row may not look."""
        call = self.call
        cap = None if call.softcap is None else call.softcap * BITS
        b, h, g = call.sizes[:3]
        n, m = rows.stop - rows.start, keys.stop - keys.start
        q = self.q[:, :, rows].reshape(b, g, h // g * n, -1)
        k = self.k[:, :, keys].transpose(-1, -2)
        if torch.is_grad_enabled():
            score = (q @ k).view(b, h, n, m)
            if cap is not None:
                score = torch.tanh(score / cap) * cap
        else:
            score = torch.matmul(q, k, out=self.space.take("score", b, g, h // g * n, m)).view(b, h, n, m)
            if cap is not None:
                score.div_(cap).tanh_().mul_(cap)
        if call.key_bias is not None or call.row_coef is not None or call.mask is not None:
            score = score + call.bias(rows, keys) * BITS
            return score.masked_fill(~call.visible(rows, keys), hidden)
        for part in self.edges(rows, keys):
            local = slice(part.start - keys.start, part.stop - keys.start)
            seen = call.visible(rows, part)
            if torch.is_grad_enabled():
                cover = torch.ones(*seen.shape[:2], n, m, dtype=torch.bool, device=score.device)
                cover[..., local] = seen
                score = score.masked_fill(~cover, hidden)
            else:
                score[..., local].masked_fill_(~seen, hidden)
        if call.row_live is not None:
            score = score.masked_fill(~call.row_live[:, None, rows, None], hidden)
        return score

    def edges(self, rows: slice, keys: slice) -> list[slice]:
        """The ranges of keys where some row of the block sees and another does not; all else is seen by all."""
        call = self.call
        columns = call.rows[rows] - call.k_start
        first, last = int(columns.min()), int(columns.max())
        parts = [self.dead_keys]
        if call.causal:
            parts.append(slice(first + 1, keys.stop))
        if call.window is not None:
            parts.append(slice(keys.start, last - call.window + 1))
        clipped = (slice(max(p.start, keys.start), min(p.stop, keys.stop)) for p in parts)
        return [p for p in clipped if p.stop > p.start]

    def block(self, rows: slice) -> Block:
        call, keys = self.call, self.reach(rows)
        b, h = call.sizes[:2]
        # a large finite number: 0 * -inf would turn entropy into nan
        hidden = torch.finfo(call.dtype).min / 4
        shape = (b, h, rows.stop - rows.start, 1)
        if keys.stop == keys.start:
            none = call.q.new_zeros(*shape[:3], 0, dtype=call.dtype)
            one = torch.ones(shape, dtype=call.dtype, device=call.q.device)
            return Block(call, rows, keys, none, none, none, one * hidden, one, one, one[..., 0] > 0, self.space)
        norm = None if self.value_norm is None else self.value_norm[..., keys]
        return Block.of(call, rows, keys, self.logits(rows, keys, hidden), hidden, self.space, norm)


def _full_rows(call: Call, request: Rows, size: int) -> Tensor:
    """[b h r k] probabilities or logits of the rows that a Rows request names."""
    with torch.no_grad():
        picked = call.for_queries(request.queries)
        if call.open and call.softcap is None and call.sinks is None and not request.logits:
            return _open_rows(replace(picked, row_columns=None))
        scorer = Scorer.of(picked, (), Workspace(call.dtype, call.q.device))
        b, h, _, n, n_keys = picked.sizes
        fill = -torch.inf if request.logits else 0.0
        full = torch.full((b, h, n, n_keys), fill, dtype=call.dtype, device=call.q.device)
        for rows in scorer.blocks(size):
            if request.logits:
                keys = scorer.reach(rows)
                full[:, :, rows, keys] = scorer.logits(rows, keys, -torch.inf) / BITS
            else:
                block = scorer.block(rows)
                full[:, :, rows, block.keys] = block.weight / block.denominator
        return full


def _open_rows(call: Call) -> Tensor:
    """[b h r k] probabilities of rows that all see every key: no block, no bookkeeping of what is hidden."""
    b, h, g, n, n_keys = call.sizes
    q = call.q.to(call.dtype) * call.scale
    if call.logit_scale is not None:
        q = q * call.logit_scale.to(call.dtype).expand(b, h)[:, :, None, None]
    score = (q.reshape(b, g, h // g * n, -1) @ call.k.to(call.dtype).mT).view(b, h, n, n_keys)
    if not call.add_key_bias:
        return score.softmax(-1)
    # a row that loses every key is zero
    return (score + call.bias()).softmax(-1).nan_to_num(0.0)
