"""What steering sees: an attention call, keys and rows by their positions, with ways to change it; what heads wrote."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.hooks.prompts.batch_spans import BatchSpans, TokenSpan
from interp.hooks.seam import Site
from interp.kernels.contract import Call, Columns, Lse, Mass, Rows
from interp.kernels.select import select

MAX_PATTERN_ENTRIES = 1 << 21
"""entries of a pattern up to which it is held whole: several sums of it cost less than a pass for each"""
MAX_SETS_PER_READ = 63
"""key sets read at once, beside one of all other keys"""


@dataclass(eq=False, kw_only=True)
class SteeringState:
    """What the edits of one context share: the batch, and what they noted."""

    bound: BatchSpans
    memory: dict[tuple[int, int], Any] = field(default_factory=dict)
    """what an edit noted of each row of the batch at a layer, by the number of the edit and the layer"""
    made: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """what an edit made for a layer whatever the batch, by the same"""
    places: dict[Any, tuple[tuple[int, ...], Tensor, Tensor]] = field(default_factory=dict)
    """what follows from where keys and rows stand: made at the first layer of a forward, for all of them"""
    _warned: set[int] = field(default_factory=set)

    def warn(self, number: int, text: str) -> None:
        """Say something about an edit, once in a context."""
        if number not in self._warned:
            self._warned.add(number)
            warnings.warn(text, stacklevel=2)


@dataclass(eq=False)
class EditContext:
    """One attention call as an edit sees it: keys and rows by their positions in the prompt."""

    site: Site
    heads: Tensor
    """Int [n] the edit's heads in this layer"""
    steering: SteeringState
    number: int
    """of the edit in its context"""

    @property
    def call(self) -> Call:
        return self.site.call

    def _once(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, for all layers of a forward whose keys and rows stand at the same places."""
        if self.call.row_columns is not None:
            # chosen rows: another choice of as many would look the same
            return make()
        stamp = (self.call.q_start, self.call.q.shape[2], self.call.k_start, self.call.k.shape[2])
        held = self.steering.places.get(name)
        # the layers of a forward share the tensor of first columns
        if held is None or held[0] != stamp or held[1] is not self.site.first:
            held = self.steering.places[name] = stamp, self.site.first, make()
        return held[2]

    @property
    def key_position(self) -> Tensor:
        """Int [b k] position of each key, negative on padding."""

        def made() -> Tensor:
            start, keys = self.call.k_start, self.call.k.shape[2]
            return torch.arange(start, start + keys, device=self.call.q.device)[None] - self.site.first[:, None]

        return self._once("key", made)

    @property
    def row_position(self) -> Tensor:
        """Int [b q] position of each query."""
        return self._once("row", lambda: self.call.rows[None] - self.site.first[:, None])

    @property
    def length(self) -> Tensor:
        """Int [b] tokens of each row's prompt."""
        return torch.tensor(self.steering.bound.lengths(self.call.q.shape[0]), device=self.call.q.device)

    @property
    def first_token(self) -> Tensor:
        """Bool [b k] the first real token."""
        return self._once("first", lambda: self.key_position == 0)

    def span_positions(self, spans: tuple[TokenSpan, ...]) -> Tensor:
        """Bool [b n] positions of each row's prompt that any of the spans has, whatever a cache still holds."""
        lengths = self.length
        place = torch.arange(int(lengths.max()), device=lengths.device).expand(len(lengths), -1)
        inside = torch.stack([self.steering.bound.at(where, place) for where in spans]).any(0)
        return inside & (place < lengths[:, None])

    def rows_after(self, spans: tuple[TokenSpan, ...]) -> Tensor:
        """Bool [b q] rows past the last token that the spans have in the prompt; none where they have none."""
        inside = self.span_positions(spans)
        last = torch.where(inside, torch.arange(inside.shape[1], device=inside.device), -1).amax(1, keepdim=True)
        return (self.row_position > last) & (last >= 0)

    def prompt_keys(self, scope: str = "prompt") -> Tensor:
        """Bool [b k] keys of the prompt; scope "all" takes generated keys in, "generated" takes them alone."""
        return self._once(("prompt", scope), lambda: self._prompt_keys(scope))

    def _prompt_keys(self, scope: str) -> Tensor:
        position = self.key_position
        real = position >= 0
        if scope == "all":
            return real
        inside = position < self.length[:, None]
        if scope not in ("prompt", "generated"):
            raise UsageError(f"scope={scope!r} is none: take 'prompt', 'all' or 'generated'.")
        return real & (inside if scope == "prompt" else ~inside)

    def keys(self, spans: tuple[TokenSpan, ...]) -> Tensor:
        """Bool [b k] keys that belong to any of the spans."""
        inside = self._once(("keys", spans), lambda: self._keys(spans))
        self.warn_outside_window(spans, inside)
        return inside

    def _keys(self, spans: tuple[TokenSpan, ...]) -> Tensor:
        found = [self.steering.bound.at(where, self.key_position) for where in spans]
        return torch.stack(found).any(0) if len(found) > 1 else found[0]

    def has_span(self, spans: tuple[TokenSpan, ...]) -> Tensor:
        """Bool [b] whether each row's prompt has a token in any of the spans."""
        rows = self.call.q.shape[0]

        def made() -> Tensor:
            there = torch.stack([self.steering.bound.has(where, rows) for where in spans])
            return there.any(0).to(self.call.q.device)

        return self._once(("has", spans), made)

    def warn_outside_window(self, spans: tuple[TokenSpan, ...], inside: Tensor) -> None:
        """Warn where the keys `inside` [b k] of these spans lie out of the last row's window."""
        window = self.call.window
        if window is None or self.call.q.shape[2] == 1:
            return
        last = self.row_position[:, -1:]
        near = self.key_position > last - window
        if bool((inside.any(1) & ~(inside & near).any(1)).any()):
            self.steering.warn(
                self.number,
                f"a span of {', '.join(map(repr, spans))} lies outside of the window of {window} keys of layer "
                f"{self.site.layer}: there no key of it is left to raise or keep for the last tokens.",
            )

    def add_key_bias(self, value: float, on: Tensor) -> Call:
        """The call with `value` added to the logits of keys `on` [b k], for the edit's heads."""
        if not bool(on.any()):
            return self.call
        b, heads, _, _, keys = self.call.sizes
        bias = torch.zeros(b, heads, keys, dtype=torch.float32, device=self.call.q.device)
        bias[:, self.heads] = torch.where(on, value, 0.0)[:, None].expand(-1, len(self.heads), -1)
        if self.call.key_bias is not None:
            bias = bias + self.call.key_bias
        call = replace(self.call, key_bias=bias)
        if value == -math.inf:
            self._check_sight(call)
        return call

    def add_row_bias(self, coefficient: Tensor, on: Tensor) -> Call:
        """The call with coefficient[b h q] added to the logits of keys `on` [b k], or [b h k], for the edit's heads.

        Several sets of keys: coefficient[b h q s], and `on` the number of the set that a key is in, from 1, 0 for none.
        """
        if not bool(on.any()):
            return self.call
        coefficient = coefficient[..., None] if coefficient.dim() == 3 else coefficient
        coefficient = torch.where(self.head_mask[:, None, None], coefficient, 0.0)
        group = on.to(torch.int32)
        if self.call.row_coef is not None:
            coefficient, group = _both(self.call.row_coef, self.call.group_of_key, coefficient, group)
        return replace(self.call, row_coef=coefficient, key_group=group)

    @property
    def head_mask(self) -> Tensor:
        """Bool [h] the edit's heads."""
        none = torch.zeros(self.call.sizes[1], dtype=torch.bool, device=self.call.q.device)
        return none.index_fill(0, self.heads, True)

    def scale_logits(self, value: float) -> Call:
        """The call with the logits of the edit's heads multiplied by `value`."""
        scale = torch.ones(self.call.sizes[1], device=self.call.q.device)
        scale[self.heads] = value
        before = self.call.logit_scale
        return replace(self.call, logit_scale=scale if before is None else before * scale)

    def mass(self, on: Tensor) -> tuple[Tensor, Tensor]:
        """Float [b h q] attention on keys `on`, [b k] or [b h k], and on all else, a learned sink included, as the call
        stands.

        The second is no difference of the first to one, which would be rounding where it is small.
        """
        if self._pattern is not None:
            own = on.float() if on.dim() == 3 else on[:, None].expand(-1, self.call.sizes[1], -1).float()
            inside, outside = (torch.einsum("bhqk,bhk->bhq", self._pattern, keys) for keys in (own, 1 - own))
            return inside, outside + self._learned
        if on.dim() == 2:
            found = self.masses(torch.stack([on, ~on], 1))
            return found[..., 0], found[..., 1] + self._learned
        # the keys of all heads, a set each, and which of them are a head's own
        union = on.any(1)
        width = int(union.sum(1).max())
        place = union.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        own = on.gather(2, place[:, None].expand(-1, on.shape[1], -1))[:, :, None]
        # rows of the batch with fewer keys name others, which lie outside already
        there = union.gather(1, place)[:, None, None]
        inside = outside = torch.zeros((), device=on.device)
        rest = ~union[:, None]
        for part in torch.arange(width, device=on.device).split(MAX_SETS_PER_READ) if width else (place.new_zeros(0),):
            sets = torch.nn.functional.one_hot(place[:, part], on.shape[2]).bool()
            found = self._read(Mass(torch.cat([sets, rest], 1)))
            single, others = found[..., : len(part)], found[..., len(part) :]
            inside = inside + (single * own[..., part]).sum(-1)
            outside = outside + (single * (there & ~own)[..., part]).sum(-1) + others.sum(-1)
            rest = rest[:, :0]
        return inside, outside + self._learned

    def masses(self, sets: Tensor) -> Tensor:
        """Float [b h q s] attention on each of the sets of keys [b s k], as the call stands."""
        if self._pattern is not None:
            return torch.einsum("bhqk,bsk->bhqs", self._pattern, sets.to(self._pattern.dtype))
        return torch.cat([self._read(Mass(part)) for part in sets.split(MAX_SETS_PER_READ, 1)], -1)

    @cached_property
    def _pattern(self) -> Tensor | None:
        """[b h q k] the pattern as the call stands, where it is small enough."""
        b, h, _, n, n_keys = self.call.sizes
        if b * h * n * n_keys > MAX_PATTERN_ENTRIES:
            return None
        return self._read(Rows(torch.arange(n, device=self.call.q.device)))

    @property
    def _learned(self) -> Tensor:
        """Float [b h q] share of a learned sink, 0 where there is none."""
        if self.call.sinks is None:
            return torch.zeros((), device=self.call.q.device)
        lse = self._read(Lse())
        return torch.exp(self.call.sinks.to(lse.dtype)[None, :, None] - lse).masked_fill(lse == -torch.inf, 0.0)

    def columns(self, rows: Tensor, every: bool = False) -> Tensor:
        """Float [b h k] mean attention that a key receives from the rows `rows` [b q] that see it, or from all."""
        read = rows.any(0).nonzero()[:, 0]
        if 0 < len(read) < rows.shape[1]:
            # a few rows cost less than a pass over all of them
            part = replace(self, site=replace(self.site, call=self.call.for_queries(read)))
            return part.columns(rows[:, read], every)
        if self._pattern is not None:
            weights = rows.to(self._pattern.dtype)
            received = torch.einsum("bhqk,bq->bhk", self._pattern, weights)
            seen = (self.call.visible() * weights[:, None, :, None]).sum(2)
        else:
            received, seen = self._read(Columns(weights=rows.float()))
        if every:
            seen = (rows & (self.row_position >= 0)).sum(1).to(received.dtype)[:, None, None]
        return received / seen.clamp(min=torch.finfo(seen.dtype).tiny)

    def _read(self, request: Any) -> Any:
        with torch.no_grad():
            return select(self.call, (request,)).engine(self.call, (request,), out=False).values[0]

    def recall(self) -> Any:
        """What `note` kept at this layer; None before."""
        return self.steering.memory.get((self.number, self.site.layer))

    def note(self, value: Any) -> None:
        """Keep something for the calls that follow at this layer."""
        self.steering.memory[self.number, self.site.layer] = value

    def _check_sight(self, call: Call) -> None:
        if call.causal and call.key_bias is not None:
            # what a row sees is a stretch of keys: counted without n x n
            seen = torch.isfinite(call.key_bias)
            seen = seen if call.live is None else seen & call.live[:, None]
            upto = torch.nn.functional.pad(seen.int().cumsum(-1), (1, 0))
            last = (call.rows - call.k_start).clamp(-1, call.sizes[4] - 1) + 1
            low = torch.zeros_like(last) if call.window is None else (last - call.window).clamp(min=0)
            blind = upto[..., last] == upto[..., low]
        else:
            blind = ~call.visible().any(-1)
        if call.row_live is not None:
            blind = blind & call.row_live[:, None]
        if bool(blind.any()):
            raise UsageError(
                f"after this edit some query of layer {self.site.layer} sees no key at all: leave it the first token, "
                "or take fewer keys away."
            )


@dataclass(eq=False)
class GateInput:
    """What some heads of a layer wrote, as a gate sees it."""

    z: Tensor
    """[b q n d] of these heads, at the input of the output projection"""
    layer: int
    heads: list[int]
    row_position: Tensor | None
    """Int [b q]; None where no edit of the context asked for positions"""
    steering: SteeringState
    number: int
    """of the edit in its context"""


def _both(coef: Tensor, group: Tensor, more: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two row-by-group biases as one: a group for each pair, coefficients added."""
    ours, theirs = coef.shape[-1] + 1, more.shape[-1] + 1
    other = other if other.dim() == 3 else other[:, None]
    pad = torch.nn.functional.pad
    total = pad(coef, (1, 0))[..., :, None] + pad(more, (1, 0))[..., None, :]
    return total.reshape(*total.shape[:-2], ours * theirs)[..., 1:], group * theirs + other
