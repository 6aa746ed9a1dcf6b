"""The Triton engine: which kernel gives what a call is asked for.

Many rows: one `forward` pass, then `gather` for single keys and `columns` for what keys receive. Few rows (decode
steps, chosen queries): their logits are written in full by `rows`, and every reduction is made of them.
"""

import contextlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.kernels.accumulators import BITS, Block, Workspace, accumulator
from interp.kernels.contract import At, Blocks, Call, Columns, Entropy, Lse, Mass, Request, Result, Rows, TopKeys
from interp.kernels.gpu.block_sums import BlockPlan
from interp.kernels.gpu.columns import columns
from interp.kernels.gpu.few_rows import rows
from interp.kernels.gpu.forward import WIDEST, Found, forward, forward_tiling
from interp.kernels.gpu.gather import at, winners
from interp.kernels.gpu.top_keys import top_keys

FEW = 16
"""rows of a call up to which they are written in full"""
HELD = 1 << 26
"""logits of chosen rows held at once: 256 MiB"""


def attend(call: Call, requests: tuple[Request, ...] = (), queries: Tensor | None = None, out: bool = True) -> Result:
    """Attention and its reductions by Triton, O(n) memory beside the results.

    out[b h q d] = sum over k of softmax(logits) v, in the dtype of v; one value a request, as `contract` has them.
    Equal to `naive.attend` up to rounding: statistics in float32; masses of 16-bit inputs to 2^-9 of a probability,
    since weights enter the matrix product in the dtype of v. queries: Int [r], the rows that requests read, or all.
    Takes every call that `select.obstacle` has nothing against; anything else must not come here.
    Cannot show: gradients, which stop here.
    """
    # launches go to the current device
    card = torch.cuda.device(call.q.device) if call.q.is_cuda else contextlib.nullcontext()
    with torch.no_grad(), card:
        if queries is None:
            return _attend(call, call, requests, None, out)
        result = _attend(call, call, (), None, True).out if out else None
        return Result(result, _attend(call, call.for_queries(queries), requests, queries, False).values)


def _attend(whole: Call, call: Call, requests: tuple[Request, ...], queries: Tensor | None, out: bool) -> Result:
    named = {i: _rows(whole, r) for i, r in enumerate(requests) if isinstance(r, Rows)}
    rest = {i: r for i, r in enumerate(requests) if i not in named}
    serve = _few if call.sizes[3] <= FEW else _many
    result, found = (None, ()) if not (rest or out) else serve(call, tuple(rest.values()), queries, out)
    values = named | dict(zip(rest, found, strict=True))
    return Result(result, tuple(values[i] for i in range(len(requests))))


def _rows(call: Call, request: Rows) -> Tensor:
    """[b h r k] of the rows that a request names."""
    kind = "logits" if request.logits else "probs"
    parts = [rows(part, out=False, scores=kind)[2] for _, part in _parts(call.for_queries(request.queries))]
    return torch.cat([part for part in parts if part is not None], 2)


def _few(
    call: Call, requests: tuple[Request, ...], queries: Tensor | None, out: bool
) -> tuple[Tensor | None, list[Any]]:
    """Everything from the rows themselves, some of them at a time."""
    steps = [accumulator(request, call, queries) for request in requests]
    outs = []
    for start, part in _parts(call):
        result, _, logits = rows(part, out=out, scores="logits" if steps else None)
        outs.append(result)
        if logits is not None:
            block = softmaxed(call, slice(start, start + part.sizes[3]), logits)
            for add, _ in steps:
                add(block)
    return torch.cat(outs, 2) if out else None, [value() for _, value in steps]


def _many(
    call: Call, requests: tuple[Request, ...], queries: Tensor | None, out: bool
) -> tuple[Tensor | None, list[Any]]:
    """One pass for all that it can give, second passes from its log-sum-exp, rows for the rest."""
    tiles = forward_tiling(call, out=False)
    cut = {i: BlockPlan.of(call, r, tiles) for i, r in enumerate(requests) if isinstance(r, Blocks)}
    plans = {i: plan for i, plan in cut.items() if plan is not None}
    slow = [i for i, r in enumerate(requests) if cut.get(i, r) is None]
    values: dict[int, Any] = {}
    if slow:
        values = dict(zip(slow, _few(call, tuple(requests[i] for i in slow), queries, False)[1], strict=True))
    wanted = [r for i, r in enumerate(requests) if i not in values]
    masses = Masses.of(call, wanted)
    groups = masses.groups()
    if not (out or wanted):
        return None, [values[i] for i in range(len(requests))]
    sets = groups[0] if groups else None
    best = forward_tiling(call, sets, out)
    for i in list(plans)[:1]:
        asked = requests[i]
        plans[i] = (BlockPlan.of(call, asked, best) if isinstance(asked, Blocks) else None) or plans[i]
    first = next(iter(plans.values()), None)
    found = forward(
        call,
        out=out,
        sets=sets,
        spans=masses.spans,
        top=any(isinstance(r, TopKeys) and r.k == 1 for r in wanted),
        entropy=any(isinstance(r, Entropy) for r in wanted),
        blocks=first,
    )
    # the first map and the first sets came out of the pass; each of the others needs one more
    more = [forward(call, out=False, blocks=plan) for plan in plans.values() if plan is not first]
    maps = dict(zip(plans, [x.map for x in (found, *more)], strict=False))
    parts = (found, *(forward(call, out=False, sets=group) for group in groups[1:]))
    masses.found = [x.mass for x in parts if x.mass is not None]
    for i, request in enumerate(requests):
        if i in plans:
            values[i] = plans[i].table(call, _made(maps[i]), found.lse)
        elif i not in values:
            values[i] = _value(request, call, queries, found, masses)
    return found.out, [values[i] for i in range(len(requests))]


def _value(request: Request, call: Call, queries: Tensor | None, found: Found, masses: "Masses") -> Any:
    if isinstance(request, Lse):
        return found.lse
    if isinstance(request, Entropy):
        return _made(found.entropy)
    if isinstance(request, TopKeys):
        if request.k > 1:
            key, probability = top_keys(call, found.lse, request.k)
        else:
            key = winners(call, _made(found.tile), found.tiling)[..., None]
            probability = _made(found.peak)[..., None]
        return torch.where(key < 0, -1, key + call.k_start) if call.k_start else key, probability
    if isinstance(request, Mass):
        return masses.of_request(request)
    if isinstance(request, At):
        local = torch.where(request.keys < 0, -1, request.keys - call.k_start)
        probs = at(call, found.lse, local, masses.norm if request.by_value else None)
        probs = probs / masses.total[..., None] if request.by_value else probs
        return probs.sum(-1) if request.total else probs
    if isinstance(request, Columns):
        weights = None if request.weights is None else request.weights.to(call.q.device, torch.float32)
        if weights is not None:
            weights = (weights if queries is None else weights[:, queries])[:, None]
        if not request.by_value:
            return columns(call, found.lse, request.stat, weights)
        shared = 1 / masses.total if weights is None else weights / masses.total
        received, _ = columns(call, found.lse, request.stat, shared)
        norm = masses.norm.repeat_interleave(call.sizes[1] // call.sizes[2], 1)
        _, saw = columns(call, found.lse, "seen", weights)
        return received * norm, saw
    raise NotImplementedError(type(request).__name__)


@dataclass(eq=False)
class Masses:
    """The key sets of all requests side by side, as columns of one product; norms of values too, where they weigh."""

    call: Call
    columns: list[Tensor]
    """[b 1|g k s] each"""
    places: dict[int, slice]
    """by id of the request"""
    by_value: bool
    spans: bool
    """whether all sets are a few ranges of keys"""
    found: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, call: Call, requests: list[Request]) -> "Masses":
        by_value = any(getattr(r, "by_value", False) for r in requests)
        spans = not by_value and all(r.spans for r in requests if isinstance(r, Mass))
        made = cls(call, [], {}, by_value, spans)
        width = 0
        for request in requests:
            if isinstance(request, Mass):
                sets = request.sets.to(call.q.device).transpose(-1, -2)[:, None]
                made.columns.append(sets.float() * made.norm[..., None] if request.by_value else sets)
                made.places[id(request)] = slice(width, width + sets.shape[-1])
                width += sets.shape[-1]
        if made.by_value:
            # in two parts, since 16 bits would round the norms of values
            high = made.norm.to(call.v.dtype).float()
            made.columns.append(torch.stack([high, made.norm - high], -1))
        return made

    @cached_property
    def norm(self) -> Tensor:
        return value_norm(self.call)

    def groups(self) -> list[Tensor]:
        """All sets, as many at a time as one pass takes."""
        if not self.columns:
            return []
        if len(self.columns) == 1 and self.columns[0].shape[-1] <= WIDEST:
            return self.columns
        g = max(column.shape[1] for column in self.columns)
        return list(torch.cat([c.expand(-1, g, -1, -1) for c in self.columns], -1).split(WIDEST, -1))

    @cached_property
    def _all(self) -> Tensor:
        return self.found[0] if len(self.found) == 1 else torch.cat(self.found, -1)

    @cached_property
    def total(self) -> Tensor:
        """float32 [b h q] sum over k of p |v|"""
        return self._all[..., -2:].sum(-1).clamp(min=torch.finfo(torch.float32).tiny)

    def of_request(self, request: Mass) -> Tensor:
        mass = self._all[..., self.places[id(request)]]
        return mass / self.total[..., None] if request.by_value else mass


def _made(x: Tensor | None) -> Tensor:
    if x is None:
        raise UsageError("the forward pass was not asked for this.")
    return x


def _parts(call: Call) -> list[tuple[int, Call]]:
    """The call, some rows at a time, so that their logits fit into HELD; with the index of the first."""
    b, h, _, n, m = call.sizes
    size = max(1, HELD // max(1, b * h * m))
    if n <= size:
        return [(0, call)]
    index = torch.arange(n, device=call.q.device)
    return [(start, call.for_queries(index[start : start + size])) for start in range(0, n, size)]


def softmaxed(call: Call, chosen: slice, logits: Tensor) -> Block:
    """The rows `chosen` as the reductions see them, from their logits [b h r k]."""
    # 0 * -inf would turn entropy into nan
    hidden = torch.finfo(logits.dtype).min / 4
    norm = value_norm(call).repeat_interleave(call.sizes[1] // call.sizes[2], 1)[:, :, None]
    space = Workspace(logits.dtype, logits.device)
    score = (logits * BITS).clamp(min=hidden)
    return Block.of(call, chosen, slice(0, logits.shape[-1]), score, hidden, space, norm)


def value_norm(call: Call) -> Tensor:
    """float32 [b g k] norm of each value, 0 on padding."""
    norm = call.v.float().norm(dim=-1)
    return norm if call.live is None else norm.masked_fill(~call.live[:, None], 0.0)
