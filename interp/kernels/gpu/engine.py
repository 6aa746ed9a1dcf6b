"""The Triton engine, which maps the requests of a call to kernels.

A call of many rows takes one `forward` pass, then `gather` for single keys and `columns` for the attention that keys
receive. For few rows (decode steps, chosen queries), `few_rows` writes all their logits, and every reduction is
computed from them.
"""

import contextlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.kernels.accumulators import BITS_PER_NAT, RowBlock, Workspace, accumulator
from interp.kernels.contract import At, Blocks, Call, Columns, Entropy, Lse, Mass, Request, Result, Rows, TopKeys
from interp.kernels.gpu.block_sums import BlockPlan
from interp.kernels.gpu.columns import columns
from interp.kernels.gpu.few_rows import attend_few_rows
from interp.kernels.gpu.forward import MAX_SETS_PER_PASS, PassResult, forward, forward_tiling
from interp.kernels.gpu.gather import at, winners
from interp.kernels.gpu.top_keys import top_keys

MAX_FEW_ROWS = 16
"""Largest number of rows of a call whose logits are all written to memory."""
MAX_ROW_LOGITS = 1 << 26
"""Number of logits of chosen rows in memory at once: 256 MiB."""


def attend(call: Call, requests: tuple[Request, ...] = (), queries: Tensor | None = None, out: bool = True) -> Result:
    """Compute attention and its reductions with Triton, in O(n) memory in addition to the results.

    `out[b h q d] = sum over k of softmax(logits) v`, in the dtype of v. The results equal those of `naive.attend` up to
    rounding, with statistics in float32. Masses of 16-bit inputs are accurate to 2^-9 of a probability, because the
    weights enter the matrix product in the dtype of v.

    Args:
        call: The attention call. It must be one for which `select.obstacle` returns None.
        requests: The reductions to compute.
        queries: Int [r], indices of the rows that the reductions read; None for all.
        out: Whether to compute the output.

    Returns:
        Result: The output, and one value per request in the form that `contract` describes.

    Limits:
        Gradients do not flow through the result.
    """
    # kernels are launched on the current device
    card = torch.cuda.device(call.q.device) if call.q.is_cuda else contextlib.nullcontext()
    with torch.no_grad(), card:
        if queries is None:
            return _attend(call, call, requests, None, out)
        result = _attend(call, call, (), None, True).out if out else None
        return Result(result, _attend(call, call.for_queries(queries), requests, queries, False).values)


def _attend(whole: Call, call: Call, requests: tuple[Request, ...], queries: Tensor | None, out: bool) -> Result:
    named = {i: _requested_rows(whole, r) for i, r in enumerate(requests) if isinstance(r, Rows)}
    rest = {i: r for i, r in enumerate(requests) if i not in named}
    serve = _attend_few if call.sizes[3] <= MAX_FEW_ROWS else _attend_many
    result, found = (None, ()) if not (rest or out) else serve(call, tuple(rest.values()), queries, out)
    values = named | dict(zip(rest, found, strict=True))
    return Result(result, tuple(values[i] for i in range(len(requests))))


def _requested_rows(call: Call, request: Rows) -> Tensor:
    """[b h r k], the rows of a Rows request."""
    kind = "logits" if request.logits else "probs"
    parts = [
        attend_few_rows(part, out=False, scores=kind)[2] for _, part in _row_chunks(call.for_queries(request.queries))
    ]
    return torch.cat([part for part in parts if part is not None], 2)


def _attend_few(
    call: Call, requests: tuple[Request, ...], queries: Tensor | None, out: bool
) -> tuple[Tensor | None, list[Any]]:
    """Compute every reduction from the logits of the rows, some rows at a time."""
    steps = [accumulator(request, call, queries) for request in requests]
    outs = []
    for start, part in _row_chunks(call):
        result, _, logits = attend_few_rows(part, out=out, scores="logits" if steps else None)
        outs.append(result)
        if logits is not None:
            block = row_block_of(call, slice(start, start + part.sizes[3]), logits)
            for add, _ in steps:
                add(block)
    return torch.cat(outs, 2) if out else None, [value() for _, value in steps]


def _attend_many(
    call: Call, requests: tuple[Request, ...], queries: Tensor | None, out: bool
) -> tuple[Tensor | None, list[Any]]:
    """Compute as much as possible in one pass, columns from its log-sum-exp, and the rest from rows of logits."""
    tiles = forward_tiling(call, out=False)
    cut = {i: BlockPlan.of(call, r, tiles) for i, r in enumerate(requests) if isinstance(r, Blocks)}
    plans = {i: plan for i, plan in cut.items() if plan is not None}
    slow = [i for i, r in enumerate(requests) if cut.get(i, r) is None]
    values: dict[int, Any] = {}
    if slow:
        values = dict(zip(slow, _attend_few(call, tuple(requests[i] for i in slow), queries, False)[1], strict=True))
    by_head = {i: r for i, r in enumerate(requests) if isinstance(r, Mass) and r.sets.dim() == 4}
    wanted = [r for i, r in enumerate(requests) if i not in values and i not in by_head]
    masses = MassColumns.of(call, wanted)
    groups = masses.groups()
    if not (out or wanted or by_head):
        return None, [values[i] for i in range(len(requests))]
    sets = groups[0] if groups else None
    best = forward_tiling(call, sets, out)
    for i in list(plans)[:1]:
        request = requests[i]
        plans[i] = (BlockPlan.of(call, request, best) if isinstance(request, Blocks) else None) or plans[i]
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
    # the pass gave the first map and the first sets; each of the others needs one more pass
    more = [forward(call, out=False, blocks=plan) for plan in plans.values() if plan is not first]
    maps = dict(zip(plans, [x.map for x in (found, *more)], strict=False))
    parts = (found, *(forward(call, out=False, sets=group) for group in groups[1:]))
    masses.found = [x.mass for x in parts if x.mass is not None]
    for i, request in enumerate(requests):
        if i in by_head:
            values[i] = masses_by_head(call, by_head[i], found.lse)
        elif i in plans:
            values[i] = plans[i].block_values(call, _required(maps[i]), found.lse)
        elif i not in values:
            values[i] = _value_of(request, call, queries, found, masses)
    return found.out, [values[i] for i in range(len(requests))]


def _value_of(request: Request, call: Call, queries: Tensor | None, found: PassResult, masses: "MassColumns") -> Any:
    if isinstance(request, Lse):
        return found.lse
    if isinstance(request, Entropy):
        return _required(found.entropy)
    if isinstance(request, TopKeys):
        if request.k > 1:
            key, probability = top_keys(call, found.lse, request.k)
        else:
            key = winners(call, _required(found.tile), found.tiling)[..., None]
            probability = _required(found.peak)[..., None]
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
class MassColumns:
    """The key sets of all requests, and the norms of the values if needed, as the columns of one matrix product."""

    call: Call
    columns: list[Tensor]
    """[b 1|g k s] each, the sets of one request."""
    places: dict[int, slice]
    """Range of the columns of each request, by its id."""
    by_value: bool
    """Whether a request weights keys by the norms of their values."""
    spans: bool
    """Whether every set consists of a few ranges of keys."""
    found: list[Tensor] = field(default_factory=list)
    """[b h q s] masses of each pass."""

    @classmethod
    def of(cls, call: Call, requests: list[Request]) -> "MassColumns":
        """Collect the key sets of the requests.

        Args:
            call: The attention call.
            requests: The requests of the call.

        Returns:
            MassColumns: The columns, without masses.
        """
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
            # split into two columns, because 16 bits would round the norms of the values
            high = made.norm.to(call.v.dtype).float()
            made.columns.append(torch.stack([high, made.norm - high], -1))
        return made

    @cached_property
    def norm(self) -> Tensor:
        """float32 [b g k], norm of each value."""
        return value_norm(self.call)

    def groups(self) -> list[Tensor]:
        """Split the columns into groups that fit into one pass.

        Returns:
            list[Tensor]: [b 1|g k s] each.
        """
        if not self.columns:
            return []
        if len(self.columns) == 1 and self.columns[0].shape[-1] <= MAX_SETS_PER_PASS:
            return self.columns
        g = max(column.shape[1] for column in self.columns)
        return list(torch.cat([c.expand(-1, g, -1, -1) for c in self.columns], -1).split(MAX_SETS_PER_PASS, -1))

    @cached_property
    def _all(self) -> Tensor:
        return self.found[0] if len(self.found) == 1 else torch.cat(self.found, -1)

    @cached_property
    def total(self) -> Tensor:
        """float32 [b h q], sum over k of p |v|."""
        return self._all[..., -2:].sum(-1).clamp(min=torch.finfo(torch.float32).tiny)

    def of_request(self, request: Mass) -> Tensor:
        """Return the masses of one request.

        Args:
            request: A request that the columns were collected from.

        Returns:
            Tensor: float32 [b h q s].
        """
        mass = self._all[..., self.places[id(request)]]
        return mass / self.total[..., None] if request.by_value else mass


def masses_by_head(call: Call, request: Mass, lse: Tensor) -> Tensor:
    """Compute the masses of key sets that differ by head: one log-sum-exp for each set, whatever its keys.

    `mass[b h q s] = exp(lse of the keys of set s - lse)`

    Args:
        call: The attention call.
        request: The request, with sets [b h s k].
        lse: float32 [b h q], the log-sum-exp of the call.

    Returns:
        Tensor: float32 [b h q s].
    """
    bias = torch.zeros((), device=call.q.device) if call.key_bias is None else call.key_bias.float()
    # a learned sink is in no set, but in the denominator
    keys = replace(call, sinks=None)
    if request.by_value:
        bias = bias + value_norm(call).repeat_interleave(call.sizes[1] // call.sizes[2], 1).log()
        lse = forward(replace(keys, key_bias=bias.expand(*call.sizes[:2], -1)), out=False).lse
    member = request.sets.to(call.q.device, torch.float32).log()
    parts = [forward(replace(keys, key_bias=bias + part), out=False).lse for part in member.unbind(2)]
    return torch.exp(torch.stack(parts, -1) - lse[..., None]).masked_fill(lse[..., None] == -torch.inf, 0.0)


def _required(x: Tensor | None) -> Tensor:
    if x is None:
        raise UsageError("the forward pass did not compute this value; pass the matching option to `forward`.")
    return x


def _row_chunks(call: Call) -> list[tuple[int, Call]]:
    """Runs of rows whose logits fit into MAX_ROW_LOGITS, each with the index of its first row."""
    b, h, _, n, m = call.sizes
    size = max(1, MAX_ROW_LOGITS // max(1, b * h * m))
    if n <= size:
        return [(0, call)]
    index = torch.arange(n, device=call.q.device)
    return [(start, call.for_queries(index[start : start + size])) for start in range(0, n, size)]


def row_block_of(call: Call, chosen: slice, logits: Tensor) -> RowBlock:
    """Compute the block of rows that the accumulators read, from its logits.

    Args:
        call: The attention call.
        chosen: Indices of the rows among the queries that are read.
        logits: [b h r k], the logits of the rows in natural units.

    Returns:
        RowBlock: The block.
    """
    # a large finite number, because 0 * -inf would make the entropy NaN
    hidden = torch.finfo(logits.dtype).min / 4
    norm = value_norm(call).repeat_interleave(call.sizes[1] // call.sizes[2], 1)[:, :, None]
    space = Workspace(logits.dtype, logits.device)
    score = (logits * BITS_PER_NAT).clamp(min=hidden)
    return RowBlock.of(call, chosen, slice(0, logits.shape[-1]), score, hidden, space, norm)


def value_norm(call: Call) -> Tensor:
    """Compute the norm of each value vector.

    Args:
        call: The attention call.

    Returns:
        Tensor: float32 [b g k], 0 on padding.
    """
    norm = call.v.float().norm(dim=-1)
    return norm if call.live is None else norm.masked_fill(~call.live[:, None], 0.0)
