"""The context of an edit: an attention call with its keys and rows by position, and methods to read and change it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.hooks.edit.steering_state import SteeringState
from interp.hooks.model.finite import finite_values
from interp.hooks.prompts.batch_spans import TokenSpan
from interp.hooks.seam import Site
from interp.kernels.contract import Call, Columns, Lse, Mass, Rows
from interp.kernels.select import select

MAX_PATTERN_ENTRIES = 1 << 21
"""Largest pattern, in entries, that is computed whole: several sums over it cost less than a pass for each."""
MAX_SETS_PER_READ = 64
"""Number of key sets read at once."""


@dataclass(eq=False)
class EditContext:
    """One attention call as an edit sees it, with keys and rows by their positions in the prompt.

    Its properties locate keys and rows, its methods read attention, and `add_key_bias`, `add_row_bias` and
    `scale_logits` return a changed call. In shapes, b is a row of the batch, h a query head, q a query and k a key that
    the cache still holds.

    Examples:
        >>> from dataclasses import dataclass
        >>> from interp.hooks.edit.edit import SpanEdit
        >>> @dataclass(frozen=True)
        ... class Double(SpanEdit):
        ...     def apply(self, here):
        ...         return here.add_key_bias(float(torch.tensor(2.0).log()), here.keys(self.spans))
        >>> with torch.no_grad(), interp.steering(model, Double("first", heads="L0H1"), prompts):
        ...     out = model(**prompts.tensors())
    """

    site: Site
    heads: Tensor
    """Int [n], the edit's heads in this layer."""
    steering: SteeringState
    number: int
    """Number of the edit in its steering context."""

    @property
    def call(self) -> Call:
        """The attention call: q, k, v, mask and biases."""
        return self.site.call

    def _once(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        """Compute a tensor once for all layers of a forward pass whose keys and rows have the same positions."""
        if self.call.row_columns is not None:
            # the stamp below cannot tell two choices of equally many rows apart
            return make()
        stamp = (self.call.q_start, self.call.q.shape[2], self.call.k_start, self.call.k.shape[2])
        cached = self.steering.shared.get(name)
        # the layers of a forward share the text of their rows
        text = self.site.text
        if cached is None or cached[0] != stamp or cached[1] is not text:
            cached = self.steering.shared[name] = stamp, text, make()
        return cached[2]

    @property
    def key_position(self) -> Tensor:
        """Int `[b k]`, the position of each key; -1 on padding, and on keys after the end of a row."""
        return self._once("key", lambda: self.site.key_position)

    @property
    def row_position(self) -> Tensor:
        """Int `[b q]`, the position of each query; -1 on padding, and on queries after the end of a row."""
        return self._once("row", lambda: self.site.row_position)

    @property
    def length(self) -> Tensor:
        """Int `[b]`, the number of tokens of each row's prompt."""
        return torch.tensor(self.steering.bound.lengths(self.call.q.shape[0]), device=self.call.q.device)

    @property
    def first_token(self) -> Tensor:
        """Bool `[b k]`, the first real token."""
        return self._once("first", lambda: self.key_position == 0)

    def span_positions(self, spans: tuple[TokenSpan, ...]) -> Tensor:
        """Locate spans in the prompts, whatever keys a cache still holds.

        Args:
            spans: The spans.

        Returns:
            Tensor: Bool `[b n]`, the positions of each row's prompt that belong to any of the spans.
        """
        lengths = self.length
        place = torch.arange(int(lengths.max()), device=lengths.device).expand(len(lengths), -1)
        inside = torch.stack([self.steering.bound.at(where, place) for where in spans]).any(0)
        return inside & (place < lengths[:, None])

    def rows_after(self, spans: tuple[TokenSpan, ...]) -> Tensor:
        """Locate the rows after the last token of the spans in the prompt.

        Args:
            spans: The spans.

        Returns:
            Tensor: Bool `[b q]`; False in rows of prompts without the spans.
        """
        inside = self.span_positions(spans)
        last = torch.where(inside, torch.arange(inside.shape[1], device=inside.device), -1).amax(1, keepdim=True)
        return (self.row_position > last) & (last >= 0)

    def prompt_keys(self, scope: str = "prompt") -> Tensor:
        """Locate the keys of the prompt or of generated tokens.

        Args:
            scope: "prompt" for the keys of the prompt, "generated" for the generated ones, "all" for both.

        Returns:
            Tensor: Bool `[b k]`.

        Raises:
            UsageError: If the scope is unknown.
        """
        return self._once(("prompt", scope), lambda: self._prompt_keys(scope))

    def _prompt_keys(self, scope: str) -> Tensor:
        position = self.key_position
        real = position >= 0
        if scope == "all":
            return real
        inside = position < self.length[:, None]
        if scope not in ("prompt", "generated"):
            raise UsageError(f"unknown scope {scope!r}; choose from 'prompt', 'all', 'generated'.")
        return real & (inside if scope == "prompt" else ~inside)

    def keys(self, spans: tuple[TokenSpan, ...]) -> Tensor:
        """Locate the keys of spans, and warn once if a span lies outside the window of the layer.

        Args:
            spans: The spans.

        Returns:
            Tensor: Bool `[b k]`, the keys that belong to any of the spans.
        """
        inside = self._once(("keys", spans), lambda: self._keys(spans))
        self.warn_outside_window(spans, inside)
        return inside

    def _keys(self, spans: tuple[TokenSpan, ...]) -> Tensor:
        found = [self.steering.bound.at(where, self.key_position) for where in spans]
        return torch.stack(found).any(0) if len(found) > 1 else found[0]

    def has_span(self, spans: tuple[TokenSpan, ...]) -> Tensor:
        """Bool `[b]`, whether each row's prompt has a token in any of the spans."""
        rows = self.call.q.shape[0]

        def make() -> Tensor:
            there = torch.stack([self.steering.bound.has(where, rows) for where in spans])
            return there.any(0).to(self.call.q.device)

        return self._once(("has", spans), make)

    def warn_outside_window(self, spans: tuple[TokenSpan, ...], inside: Tensor) -> None:
        """Warn if the keys `inside` `[b k]` of spans lie outside the window of the last row."""
        window = self.call.window
        if window is None or self.call.q.shape[2] == 1:
            return
        # windows count columns, padding included
        last = torch.where(self.row_position >= 0, self.call.rows, -1).amax(1, keepdim=True)
        near = torch.arange(inside.shape[1], device=inside.device) + self.call.k_start > last - window
        if bool((inside.any(1) & ~(inside & near).any(1)).any()):
            self.steering.warn(
                self.number,
                f"a span of {', '.join(map(repr, spans))} lies outside of the window of {window} keys of layer "
                f"{self.site.layer}, so the last tokens cannot attend to it: "
                "steer heads of layers with full attention.",
            )

    def add_key_bias(self, value: float, on: Tensor) -> Call:
        """Add a number to the logits of some keys, for the edit's heads.

        Args:
            value: The number; log w multiplies the attention by w before it is normalised, -inf hides the keys.
            on: Bool `[b k]`, the keys.

        Returns:
            Call: The changed call.

        Raises:
            UsageError: If a query is left without any key to see.
        """
        if not bool(on.any()):
            return self.call
        b, heads, _, _, keys = self.call.sizes
        bias = torch.zeros(b, heads, keys, dtype=torch.float32, device=self.call.q.device)
        bias[:, self.heads] = torch.where(on, value, 0.0)[:, None].expand(-1, len(self.heads), -1)
        if self.call.key_bias is not None:
            bias = bias + self.call.key_bias
        call = replace(self.call, key_bias=bias)
        if value == -math.inf:
            self._check_visible_keys(call)
        return call

    def add_row_bias(self, coefficient: Tensor, on: Tensor) -> Call:
        """Add a coefficient of each row to the logits of some keys, for the edit's heads.

        Args:
            coefficient: Float `[b h q]`, or `[b h q s]` for several sets of keys.
            on: Bool `[b k]` or `[b h k]`, the keys. With several sets: Int, the number of the set that each key is in,
                from 1, and 0 for none.

        Returns:
            Call: The changed call.
        """
        if not bool(on.any()):
            return self.call
        coefficient = coefficient[..., None] if coefficient.dim() == 3 else coefficient
        coefficient = torch.where(self.head_mask[:, None, None], coefficient, 0.0)
        group = on.to(torch.int32)
        if self.call.row_coef is not None:
            coefficient, group = _combine_row_biases(self.call.row_coef, self.call.group_of_key, coefficient, group)
        return replace(self.call, row_coef=coefficient, key_group=group)

    @property
    def head_mask(self) -> Tensor:
        """Bool `[h]`, the edit's heads."""
        none = torch.zeros(self.call.sizes[1], dtype=torch.bool, device=self.call.q.device)
        return none.index_fill(0, self.heads, True)

    def scale_logits(self, value: float) -> Call:
        """Multiply the logits of the edit's heads by a number.

        Args:
            value: The number.

        Returns:
            Call: The changed call.
        """
        scale = torch.ones(self.call.sizes[1], device=self.call.q.device)
        scale[self.heads] = value
        before = self.call.logit_scale
        return replace(self.call, logit_scale=scale if before is None else before * scale)

    def mass(self, on: Tensor) -> tuple[Tensor, Tensor]:
        """Read the attention to some keys and to everything else, with the biases that the call has so far.

        The second number is summed, not computed as one less the first, which would be rounding error where it is
        small.

        Args:
            on: Bool `[b k]` or `[b h k]`, the keys.

        Returns:
            tuple[Tensor, Tensor]: Float `[b h q]` each: the attention to the keys, and to all other keys and a learned
                sink.
        """
        found = self.masses(torch.stack([on, ~on], -2))
        return found[..., 0], found[..., 1] + self._sink_share

    def masses(self, sets: Tensor) -> Tensor:
        """Read the attention to several sets of keys, with the biases that the call has so far.

        Args:
            sets: Bool `[b s k]`, the sets, or `[b h s k]` if heads differ.

        Returns:
            Tensor: Float `[b h q s]`.
        """
        if self._pattern is not None:
            sets = sets if sets.dim() == 4 else sets[:, None]
            return self._pattern @ sets.to(self._pattern.dtype).transpose(-1, -2)
        return torch.cat([self._read(Mass(part)) for part in sets.split(MAX_SETS_PER_READ, -2)], -1)

    @cached_property
    def _pattern(self) -> Tensor | None:
        """The pattern [b h q k] of the call so far; None if it is larger than MAX_PATTERN_ENTRIES."""
        b, h, _, n, n_keys = self.call.sizes
        if b * h * n * n_keys > MAX_PATTERN_ENTRIES:
            return None
        return self._read(Rows(torch.arange(n, device=self.call.q.device)))

    @property
    def _sink_share(self) -> Tensor:
        """Share of a learned sink, Float [b h q]; 0 if there is none."""
        if self.call.sinks is None:
            return torch.zeros((), device=self.call.q.device)
        lse = self._read(Lse())
        return torch.exp(self.call.sinks.to(lse.dtype)[None, :, None] - lse).masked_fill(lse == -torch.inf, 0.0)

    def columns(self, rows: Tensor, all_rows: bool = False) -> Tensor:
        """Read the mean attention that each key receives, with the biases that the call has so far.

        Args:
            rows: Bool `[b q]`, the rows to average over.
            all_rows: Average over all of these rows, and not only over those that see the key.

        Returns:
            Tensor: Float `[b h k]`.
        """
        read = rows.any(0).nonzero()[:, 0]
        if 0 < len(read) < rows.shape[1]:
            # reading a few rows costs less than a pass over all
            part = replace(self, site=replace(self.site, call=self.call.for_queries(read)))
            return part.columns(rows[:, read], all_rows)
        if self._pattern is not None:
            weights = rows.to(self._pattern.dtype)
            received = torch.einsum("bhqk,bq->bhk", self._pattern, weights)
            seen = (self.call.visible() * weights[:, None, :, None]).sum(2)
        else:
            received, seen = self._read(Columns(weights=rows.float()))
        if all_rows:
            seen = (rows & (self.row_position >= 0)).sum(1).to(received.dtype)[:, None, None]
        return received / seen.clamp(min=torch.finfo(seen.dtype).tiny)

    def _read(self, request: Any) -> Any:
        with torch.no_grad():
            values = select(self.call, (request,)).engine(self.call, (request,), out=False).values
        return finite_values(self.site, values)[0]

    def recall(self) -> Any:
        """Return the edit's note at this layer; None if there is none."""
        return self.steering.memory.get((self.number, self.site.layer))

    def note(self, value: Any) -> None:
        """Store a value for later calls at this layer, as from prefill to decode.

        Args:
            value: The value, which `recall` returns.
        """
        self.steering.memory[self.number, self.site.layer] = value

    def _check_visible_keys(self, call: Call) -> None:
        """Refuse a call in which some query sees no key."""
        if call.causal and call.key_bias is not None:
            # each row sees a contiguous range of keys, so they can be counted without an n x n mask
            seen = torch.isfinite(call.key_bias)
            seen = seen if call.live is None else seen & call.live[:, None]
            upto = torch.nn.functional.pad(seen.int().cumsum(-1), (1, 0))
            last = (call.rows - call.k_start).clamp(-1, call.sizes[4] - 1) + 1
            low = torch.zeros_like(last) if call.window is None else (last - call.window).clamp(min=0)
            blind = upto[..., last] == upto[..., low]
        else:
            blind = ~call.visible().any(-1)
        blind = blind & (self.row_position >= 0)[:, None]
        if bool(blind.any()):
            raise UsageError(
                f"after this edit some query of layer {self.site.layer} sees no key at all: keep the first token, "
                "or hide fewer keys."
            )


def _combine_row_biases(coef: Tensor, group: Tensor, more: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two biases of rows times groups of keys: one group for each pair, whose coefficients are added."""
    n_groups, n_others = coef.shape[-1] + 1, more.shape[-1] + 1
    other = other if other.dim() == 3 else other[:, None]
    pad = torch.nn.functional.pad
    total = pad(coef, (1, 0))[..., :, None] + pad(more, (1, 0))[..., None, :]
    return total.reshape(*total.shape[:-2], n_groups * n_others)[..., 1:], group * n_others + other
