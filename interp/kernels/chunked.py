"""Attention with reductions in O(n * block) memory, plain torch, any device: a block of rows at a time, all its keys.

A block's rows are complete, so every reduction comes out of the one pass over q k^T, columns included.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.kernels.contract import Call, Mass, Request, Result, Rows
from interp.kernels.reductions import Block, Workspace, accumulator

BLOCK_ELEMENTS = 1 << 20
"""scores held at once: 4 MiB in float32"""


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
    if rest or out:
        result, found = _sweep(call, rest, queries, out, block)
        for i, value in zip((i for i in range(len(requests)) if i not in chosen), found, strict=True):
            values[i] = value
        return Result(result, tuple(values))
    return Result(None, tuple(values))


def _sweep(
    call: Call, requests: tuple[Request, ...], queries: Tensor | None, out: bool, size: int
) -> tuple[Tensor | None, list[Any]]:
    b, h, g = call.sizes[:3]
    steps = [accumulator(request, call, queries) for request in requests]
    scorer = Scorer.of(call, requests)
    values, columns = scorer.v, {}
    if out and not torch.is_grad_enabled():
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
                outs.append((product[..., : scorer.v.shape[-1]] / block.denominator).to(call.v.dtype))
                block.sums = {name: product[..., column] for name, column in columns.items()}
        with torch.no_grad():
            for add, _ in steps:
                add(block)
    empty = call.v.new_zeros(b, h, 0, call.v.shape[-1])
    return (torch.cat(outs, 2) if outs else empty) if out else None, [value() for _, value in steps]


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
    def of(cls, call: Call, requests: tuple[Request, ...]) -> "Scorer":
        b, h, g = call.sizes[:3]
        q = call.q.to(call.dtype) * call.scale
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
        space = Workspace(call.dtype, call.q.device)
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
        """The range of keys that some row of the block may see."""
        call, n_keys = self.call, self.k.shape[2]
        columns = call.rows[rows] - call.k_start
        low, high = 0, n_keys
        if call.causal:
            high = min(n_keys, int(columns.max()) + 1)
        if call.window is not None:
            low = max(0, int(columns.min()) - call.window + 1)
        return slice(min(low, n_keys), max(high, min(low, n_keys)))

    def logits(self, rows: slice, keys: slice, hidden: float) -> Tensor:
        """[b h r k] logits with `hidden` wherever a row may not look."""
        call = self.call
        b, h, g = call.sizes[:3]
        n, m = rows.stop - rows.start, keys.stop - keys.start
        q = self.q[:, :, rows].reshape(b, g, h // g * n, -1)
        k = self.k[:, :, keys].transpose(-1, -2)
        if torch.is_grad_enabled():
            score = (q @ k).view(b, h, n, m)
            if call.softcap is not None:
                score = torch.tanh(score / call.softcap) * call.softcap
        else:
            score = torch.matmul(q, k, out=self.space.take("score", b, g, h // g * n, m)).view(b, h, n, m)
            if call.softcap is not None:
                score.div_(call.softcap).tanh_().mul_(call.softcap)
        if call.key_bias is not None or call.row_coef is not None or call.mask is not None:
            score = score + call.bias(rows, keys)
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
            parts.append(slice(first + 1, last + 1))
        if call.window is not None:
            parts.append(slice(first - call.window + 1, last - call.window + 1))
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
            return Block(call, rows, keys, none, none, one * hidden, one, one, one[..., 0] > 0, self.space)
        score = self.logits(rows, keys, hidden)
        peak = score.detach().amax(-1, keepdim=True)
        dead = peak[..., 0] <= hidden / 2
        sink = None
        if call.sinks is not None:
            sink = call.sinks.to(call.dtype)[None, :, None, None]
            peak = torch.maximum(peak, sink.detach().expand(shape))
        if torch.is_grad_enabled():
            shifted = score - peak
            weight = torch.exp(shifted)
        else:
            shifted = score.sub_(peak)
            weight = torch.exp(shifted, out=self.space.take("weight", *score.shape))
        if bool(dead.any()):
            weight = weight.masked_fill(dead[..., None], 0.0)
        total = weight.sum(-1, keepdim=True)
        denominator = total if sink is None else total + torch.exp(sink - peak)
        denominator = denominator.masked_fill(dead[..., None], 1.0)
        norm = None if self.value_norm is None else self.value_norm[..., keys]
        return Block(call, rows, keys, weight, shifted, peak, total, denominator, dead, self.space, norm)


def _full_rows(call: Call, request: Rows, size: int) -> Tensor:
    """[b h r k] probabilities or logits of the rows that a Rows request names."""
    with torch.no_grad():
        picked = call.for_queries(request.queries)
        scorer = Scorer.of(picked, ())
        b, h, _, n, n_keys = picked.sizes
        fill = -torch.inf if request.logits else 0.0
        full = torch.full((b, h, n, n_keys), fill, dtype=call.dtype, device=call.q.device)
        for rows in scorer.blocks(size):
            if request.logits:
                keys = scorer.reach(rows)
                full[:, :, rows, keys] = scorer.logits(rows, keys, -torch.inf)
            else:
                block = scorer.block(rows)
                full[:, :, rows, block.keys] = block.weight / block.denominator
        return full
