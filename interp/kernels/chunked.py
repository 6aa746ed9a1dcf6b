"""Attention with reductions in plain torch, on any device, in O(n * block) memory.

It processes a block of rows with all its keys at a time. Since the rows of a block are complete, one pass over q k^T
gives every reduction, including the columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interp.kernels import naive
from interp.kernels.accumulators import BITS_PER_NAT, KEYS_PER_TILE, RowBlock, Workspace, accumulator, join
from interp.kernels.contract import Call, Mass, Request, Result, Rows
from interp.kernels.folding import fold_biases
from interp.kernels.padding import without_padding
from interp.kernels.sdpa import attend_by_sdpa, suits_sdpa

BLOCK_ELEMENTS = 1 << 21
"""Scores of one block: 8 MiB in float32."""


def attend(
    call: Call,
    requests: tuple[Request, ...] = (),
    queries: Tensor | None = None,
    out: bool = True,
    block: int = BLOCK_ELEMENTS,
) -> Result:
    """Compute attention and its reductions, one block of rows after the other.

    `out[b h q d] = sum over k of softmax(logits) v`, equal to `naive.attend` up to rounding. Statistics are float32, or
    float64 if q is float64. The call needs memory for a few times `block` scores, the outputs, and float32 copies of k
    and v. Gradients flow through `out`, but not through the reductions.

    Args:
        call: The attention call.
        requests: The reductions to compute.
        queries: Int [r], indices of the rows that the reductions read; None for all.
        out: Whether to compute the output.
        block: Number of scores that are computed at once.

    Returns:
        Result: The output, and one value per request.

    Examples:
        >>> from interp.kernels import chunked
        >>> from interp.kernels.contract import Call, Entropy
        >>> q = torch.zeros(1, 1, 4, 8)
        >>> chunked.attend(Call(q, q, q, scale=1.0), (Entropy(),)).values[0]
        tensor([[[0.0000, 0.6931, 1.0986, 1.3863]]])
    """
    if 0 in (*call.q.shape, *call.k.shape):
        # there is nothing to split into blocks
        return naive.attend(call, requests, queries, out)
    call = fold_biases(without_padding(call))
    if out and queries is not None:
        # the output needs all rows, and the reductions need only the chosen ones
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
    if out and not rest and suits_sdpa(call, block):
        result = attend_by_sdpa(call, block)
    elif rest or out:
        result, found = _attend_by_kv_heads(call, rest, queries, out, block)
        for i, value in zip((i for i in range(len(requests)) if i not in chosen), found, strict=True):
            values[i] = value
    return Result(result, tuple(values))


def _attend_by_kv_heads(
    call: Call, requests: tuple[Request, ...], queries: Tensor | None, out: bool, size: int
) -> tuple[Tensor | None, list[Any]]:
    """Process one kv head after the other if the call is larger than a block: fewer and taller matrix products."""
    b, h, g, n, n_keys = call.sizes
    parts = [call] if b * h * n * n_keys <= size else list(split_kv_heads(call))
    space = Workspace(call.dtype, call.q.device, min(max(size, b * h // g * n_keys), b * h * n * n_keys))
    grad = torch.is_grad_enabled()
    # memory order [b q h e], which the model expects; gradients need separate parts that are concatenated
    whole = None if grad or not out else call.v.new_empty(b, n, h, call.v.shape[-1]).transpose(1, 2)
    places = [None] * len(parts) if whole is None else whole.chunk(len(parts), 1)
    own = [requests] if len(parts) == 1 else [tuple(_of_kv_head(r, i, g) for r in requests) for i in range(g)]
    work = zip(parts, own, places, strict=True)
    found = [_attend_blocks(part, each, queries, out, size, space, place) for part, each, place in work]
    if out and whole is None:
        whole = torch.cat([result for result, _ in found if result is not None], 1)
    if len(parts) == 1:
        return whole, found[0][1]
    values = zip(*(values for _, values in found), strict=True)
    return whole, [join(request, list(each)) for request, each in zip(requests, values, strict=True)]


def _of_kv_head(request: Request, i: int, g: int) -> Request:
    """The request for the query heads of one of g kv heads; only key sets that differ by head depend on it."""
    if not isinstance(request, Mass) or request.sets.dim() < 4:
        return request
    return replace(request, sets=request.sets.chunk(g, 1)[i])


def split_kv_heads(call: Call) -> Iterator[Call]:
    """Split a call into one call per kv head, with the query heads that share it.

    Args:
        call: The attention call.

    Yields:
        Call: The call of one kv head, made of views.
    """
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


def _attend_blocks(
    call: Call,
    requests: tuple[Request, ...],
    queries: Tensor | None,
    out: bool,
    size: int,
    space: Workspace,
    place: Tensor | None,
) -> tuple[Tensor | None, list[Any]]:
    """The output, written to `place` if it is given, and the value of each request."""
    b, h, g = call.sizes[:3]
    steps = [accumulator(request, call, queries) for request in requests]
    scorer = Scorer.of(call, requests, space)
    values, columns = scorer.v, {}
    if place is not None:
        # a key set becomes one more column of v, so that its mass needs no separate pass
        for request in requests:
            if isinstance(request, Mass) and not request.by_value and request.sets.dim() == 3:
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
    """Computes the blocks of one call: their ranges of rows and keys, the logits and the softmax."""

    call: Call
    q: Tensor
    """[b h q d] with all scales applied, in bits."""
    k: Tensor
    """[b g k d]."""
    v: Tensor
    """[b g k e]."""
    value_norm: Tensor | None
    """[b h 1 k] norms of the values; None if no request needs them."""
    dead_keys: slice
    """The narrowest range that contains every padded key."""
    space: Workspace
    """Memory that the blocks share."""

    @classmethod
    def of(cls, call: Call, requests: tuple[Request, ...], space: Workspace) -> "Scorer":
        """Prepare a call.

        Args:
            call: The attention call.
            requests: The reductions that will be computed.
            space: Memory that the blocks share.

        Returns:
            Scorer: The scorer of the call.
        """
        b, h, g = call.sizes[:3]
        q = call.q.to(call.dtype) * (call.scale * BITS_PER_NAT)
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
        """Split the rows into blocks of about `size` scores.

        Args:
            size: Number of scores of a block. Where few keys are visible, a block has up to four times as many rows.

        Returns:
            list[slice]: Consecutive ranges of rows.
        """
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
        """Return the range of keys that at least one row of a block sees.

        Args:
            rows: Range of rows.

        Returns:
            slice: Range of keys, extended to whole tiles if there are enough keys.
        """
        call, n_keys = self.call, self.k.shape[2]
        columns = call.rows[rows] - call.k_start
        low, high = 0, n_keys
        if call.causal:
            high = min(n_keys, int(columns.max()) + 1)
        if call.window is not None:
            low = max(0, int(columns.min()) - call.window + 1)
        if high <= low:
            return slice(0, 0)
        return slice(low - low % KEYS_PER_TILE, min(n_keys, high + -high % KEYS_PER_TILE))

    def logits(self, rows: slice, keys: slice, hidden: float) -> Tensor:
        """Compute the logits of a block.

        Args:
            rows: Range of rows.
            keys: Range of keys.
            hidden: Value for keys that are not visible.

        Returns:
            Tensor: [b h r k] logits in bits.
        """
        call = self.call
        cap = None if call.softcap is None else call.softcap * BITS_PER_NAT
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
            score = score + call.bias(rows, keys) * BITS_PER_NAT
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
        """Return the ranges of keys that may be visible to some rows of a block and hidden from others.

        Args:
            rows: Range of rows.
            keys: Range of keys.

        Returns:
            list[slice]: Ranges of keys. All other keys are visible to every row.
        """
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

    def block(self, rows: slice) -> RowBlock:
        """Compute the logits and the softmax of a block.

        Args:
            rows: Range of rows.

        Returns:
            RowBlock: The block over the keys that its rows see.
        """
        call, keys = self.call, self.reach(rows)
        b, h = call.sizes[:2]
        # a large finite number, because 0 * -inf would make the entropy NaN
        hidden = torch.finfo(call.dtype).min / 4
        shape = (b, h, rows.stop - rows.start, 1)
        if keys.stop == keys.start:
            none = call.q.new_zeros(*shape[:3], 0, dtype=call.dtype)
            one = torch.ones(shape, dtype=call.dtype, device=call.q.device)
            return RowBlock(call, rows, keys, none, none, none, one * hidden, one, one, one[..., 0] > 0, self.space)
        norm = None if self.value_norm is None else self.value_norm[..., keys]
        return RowBlock.of(call, rows, keys, self.logits(rows, keys, hidden), hidden, self.space, norm)


def _full_rows(call: Call, request: Rows, size: int) -> Tensor:
    """[b h r k] probabilities or logits of the rows of a Rows request."""
    with torch.no_grad():
        picked = call.for_queries(request.queries)
        if call.sees_all_keys and call.softcap is None and call.sinks is None and not request.logits:
            return _open_rows(replace(picked, row_columns=None))
        scorer = Scorer.of(picked, (), Workspace(call.dtype, call.q.device))
        b, h, _, n, n_keys = picked.sizes
        fill = -torch.inf if request.logits else 0.0
        full = torch.full((b, h, n, n_keys), fill, dtype=call.dtype, device=call.q.device)
        for rows in scorer.blocks(size):
            if request.logits:
                keys = scorer.reach(rows)
                full[:, :, rows, keys] = scorer.logits(rows, keys, -torch.inf) / BITS_PER_NAT
            else:
                block = scorer.block(rows)
                full[:, :, rows, block.keys] = block.weight / block.denominator
        return full


def _open_rows(call: Call) -> Tensor:
    """[b h r k] probabilities of rows that all see every key, computed without blocks and without a mask."""
    b, h, g, n, n_keys = call.sizes
    q = call.q.to(call.dtype) * call.scale
    if call.logit_scale is not None:
        q = q * call.logit_scale.to(call.dtype).expand(b, h)[:, :, None, None]
    score = (q.reshape(b, g, h // g * n, -1) @ call.k.to(call.dtype).mT).view(b, h, n, n_keys)
    if not call.adds_bias:
        return score.softmax(-1)
    # a row whose keys are all hidden by biases is zero
    score = score + call.bias()
    return score.softmax(-1).masked_fill((score == -torch.inf).all(-1, keepdim=True), 0.0)
