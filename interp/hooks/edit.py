"""Steering: attention re-weighted while the model runs, as biases on its logits, never as an edit of probabilities.

"Multiply by w and renormalise" is "add log w before the softmax", so every edit is a bias on keys, a coefficient for
each row times a set of keys, a scale of the logits, or a gate on what a head writes.
"""

import contextlib
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp.hooks.bound import Bound, Where
from interp.hooks.heads import HeadLayout, HeadSet
from interp.hooks.modules import plain, projection_inputs
from interp.hooks.prompts import Prompts
from interp.hooks.seam import Seam, Site, Want, tapping
from interp.kernels.contract import Call, Columns, Lse, Mass
from interp.kernels.errors import SpanError, UsageError
from interp.kernels.select import select

WIDEST = 63
"""key sets read at once, beside one of all other keys"""


@dataclass(frozen=True)
class Edit:
    """Base of the edits: heads that it acts on, and what it does to an attention call. Edits add up: a + b."""

    heads: str = field(default="all", kw_only=True)
    """anything HeadSet.parse takes; kept as its words"""

    def __post_init__(self) -> None:
        if not isinstance(self.heads, str):
            object.__setattr__(self, "heads", str(HeadSet.parse(self.heads)))

    def __add__(self, other: "Edit | Edits") -> "Edits":
        return Edits((self,)) + other

    @property
    def idle(self) -> bool:
        """Whether the edit changes nothing by its own settings, as with a factor of one."""
        return False

    def change(self, here: "Here") -> Call:
        """The call with the edit in it, or the call as it is."""
        return here.call

    @property
    def gate(self) -> float | None:
        """What the heads' outputs are multiplied by; None for edits of attention."""
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"edit": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Edits:
    """Several edits, in order; prints, hashes, and saves as JSON."""

    edits: tuple[Edit, ...] = ()

    def __add__(self, other: "Edit | Edits") -> "Edits":
        return Edits(self.edits + (other.edits if isinstance(other, Edits) else (other,)))

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.edits)) or "Edits()"

    def save(self, path: str | Path) -> Path:
        """Write the edits to a JSON file; `Edits.load` reads it."""
        path = Path(path)
        path.write_text(json.dumps([edit.to_dict() for edit in self.edits], indent=1), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Edits":
        """The inverse of save. Raises UsageError for a file that is not one."""
        known = {kind.__name__: kind for kind in _kinds(Edit)}
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            made = []
            for entry in stored:
                settings = {name: _listed(value) for name, value in entry.items() if name != "edit"}
                made.append(known[entry["edit"]](**settings))
            return cls(tuple(made))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} holds no saved edits ({error}): give a file that Edits.save wrote.") from None


def _kinds(kind: type[Edit]) -> Iterator[type[Edit]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _kinds(sub)


def _listed(value: Any) -> Any:
    """A range that was written as a list becomes a tuple again; the list around it stays one."""
    return [tuple(part) if isinstance(part, list) else part for part in value] if isinstance(value, list) else value


@contextlib.contextmanager
def steering(model: nn.Module, edits: "Edit | Edits", prompts: Prompts | None = None) -> Iterator["Steering"]:
    """Let edits act on a model's attention for as long as the context is open: forward() and generate() alike.

        with interp.steering(model, interp.steer.Pasta("mark", heads=heads), prompts):
            model.generate(**prompts.tensors(), max_new_tokens=40)

    prompts: the batch that runs, for edits that name spans; spans are bound once, to absolute positions. Prefill and
    decode mean the same: cached generation equals a full recompute at every token. Layers that no edit names run the
    model's own attention, and edits that change nothing leave logits equal to the bit.
    Raises HeadError for heads the model does not have, SpanError for spans no prompt has or a batch longer than the
    prompts (lengths are all that is compared), UsageError for a query that would see no key.
    Cannot show: what the heads were doing before; see capture and causal_check.
    """
    model = plain(model)
    if not isinstance(edits, Edit | Edits):
        raise UsageError(f"{edits!r} is no edit: give one of interp.steer, or several added up.")
    steering = Steering(HeadLayout.of(model), Edits(()) + edits, Bound(prompts))
    with contextlib.ExitStack() as stack:
        if any(steering.layers(edit) for edit in steering.edits if edit.gate is None):
            steering.seam = stack.enter_context(tapping(model, steering))
        gated = {layer for edit in steering.edits if edit.gate is not None for layer in steering.layers(edit)}
        if gated:
            stack.enter_context(projection_inputs(model, sorted(gated), steering.gated))
        yield steering


@dataclass(eq=False)
class Steering:
    """Edits of one context, bound to a model and a batch."""

    layout: HeadLayout
    edits: Edits
    bound: Bound
    seam: Seam | None = None
    memory: dict[tuple[int, int], Any] = field(default_factory=dict)
    """what an edit noted at a layer, by the number of the edit and the layer"""
    _heads: dict[Edit, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    _warned: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for edit in self.edits:
            idle = edit.idle or not edit.heads
            self._heads[edit] = {} if idle else HeadSet.parse(edit.heads, self.layout).by_layer()

    def layers(self, edit: Edit) -> dict[int, tuple[int, ...]]:
        return self._heads[edit]

    def at(self, layer: int) -> bool:
        return any(layer in self._heads[edit] for edit in self.edits if edit.gate is None)

    def want(self, site: Site) -> Want | None:
        return None

    def take(self, site: Site, want: Want, values: tuple[Any, ...]) -> None:
        return None

    def edit(self, site: Site) -> Call:
        self.bound.match(site)
        call = site.call
        for number, edit in enumerate(self.edits):
            heads = self._heads[edit].get(site.layer)
            if heads and edit.gate is None:
                index = torch.tensor(heads, device=call.q.device)
                call = edit.change(Here(replace(site, call=call), index, self, number))
        return call

    def gated(self, layer: int, x: Tensor) -> Tensor:
        """x [b q h*d] with the outputs of gated heads scaled."""
        z = x.unflatten(-1, (self.layout.heads, -1)).clone()
        for edit in self.edits:
            heads = self._heads[edit].get(layer)
            if heads and edit.gate is not None:
                z[:, :, list(heads)] *= edit.gate
        return z.flatten(-2)

    def warn(self, number: int, text: str) -> None:
        """Say something about an edit, once in a context."""
        if number not in self._warned:
            self._warned.add(number)
            warnings.warn(text, stacklevel=2)


@dataclass(eq=False)
class Here:
    """One attention call as an edit sees it: keys and rows by their positions in the prompt."""

    site: Site
    heads: Tensor
    """Int [n] the edit's heads in this layer"""
    steering: Steering
    number: int
    """of the edit in its context"""

    @property
    def call(self) -> Call:
        return self.site.call

    @property
    def key_position(self) -> Tensor:
        """Int [b k] position of each key, negative on padding."""
        columns = torch.arange(self.call.k_start, self.call.k_start + self.call.k.shape[2], device=self.call.q.device)
        return columns[None] - self.site.first[:, None]

    @property
    def row_position(self) -> Tensor:
        """Int [b q] position of each query."""
        return self.call.rows[None] - self.site.first[:, None]

    @property
    def first(self) -> Tensor:
        """Bool [b k] the first real token."""
        return self.key_position == 0

    def prompt(self, scope: str = "prompt") -> Tensor:
        """Bool [b k] keys of the prompt; scope "all" takes generated keys in, "generated" takes them alone."""
        position = self.key_position
        real = position >= 0
        if scope == "all":
            return real
        lengths = torch.tensor(self.steering.bound.lengths(position.shape[0]), device=position.device)
        inside = position < lengths[:, None]
        if scope not in ("prompt", "generated"):
            raise UsageError(f"scope={scope!r} is none: take 'prompt', 'all' or 'generated'.")
        return real & (inside if scope == "prompt" else ~inside)

    def keys(self, spans: tuple[Where, ...]) -> Tensor:
        """Bool [b k] keys that belong to any of the spans."""
        position = self.key_position
        inside = torch.zeros_like(position, dtype=torch.bool)
        for where in spans:
            inside = inside | self.steering.bound.at(where, position)
        self._warn_of_window(spans, inside)
        return inside

    def has(self, spans: tuple[Where, ...]) -> Tensor:
        """Bool [b] whether each row's prompt has a token in any of the spans."""
        rows = self.call.q.shape[0]
        there = torch.stack([self.steering.bound.has(where, rows) for where in spans])
        return there.any(0).to(self.call.q.device)

    def _warn_of_window(self, spans: tuple[Where, ...], inside: Tensor) -> None:
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

    def biased(self, value: float, on: Tensor) -> Call:
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

    def weighed(self, coefficient: Tensor, on: Tensor) -> Call:
        """The call with coefficient[b h q] added to the logits of keys `on` [b k], or [b h k], for the edit's heads."""
        if not bool(on.any()):
            return self.call
        heads = self.call.sizes[1]
        chosen = torch.zeros(heads, dtype=torch.bool, device=coefficient.device).index_fill(0, self.heads, True)
        coefficient = torch.where(chosen[:, None], coefficient, 0.0)[..., None]
        group = on.to(torch.int32)
        if self.call.row_coef is not None:
            coefficient, group = _both(self.call.row_coef, self.call.group_of_key, coefficient, group)
        return replace(self.call, row_coef=coefficient, key_group=group)

    def scaled(self, value: float) -> Call:
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
        if on.dim() == 2:
            found = self._read(Mass(torch.stack([on, ~on], 1)))
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
        for part in torch.arange(width, device=on.device).split(WIDEST) if width else (place.new_zeros(0),):
            sets = torch.nn.functional.one_hot(place[:, part], on.shape[2]).bool()
            found = self._read(Mass(torch.cat([sets, rest], 1)))
            single, others = found[..., : len(part)], found[..., len(part) :]
            inside = inside + (single * own[..., part]).sum(-1)
            outside = outside + (single * (there & ~own)[..., part]).sum(-1) + others.sum(-1)
            rest = rest[:, :0]
        return inside, outside + self._learned

    @property
    def _learned(self) -> Tensor:
        """Float [b h q] share of a learned sink, 0 where there is none."""
        if self.call.sinks is None:
            return torch.zeros((), device=self.call.q.device)
        lse = self._read(Lse())
        return torch.exp(self.call.sinks.to(lse.dtype)[None, :, None] - lse).masked_fill(lse == -torch.inf, 0.0)

    def columns(self, rows: Tensor) -> Tensor:
        """Float [b h k] mean attention that a key receives from the rows `rows` [b q] that see it."""
        received, seen = self._read(Columns(weights=rows.float()))
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
        seen = torch.isfinite(call.key_bias if call.key_bias is not None else torch.zeros(1, 1, 1))
        if call.live is not None:
            seen = seen & call.live[:, None]
        upto = torch.nn.functional.pad(seen.int().cumsum(-1), (1, 0))
        last = (call.rows - call.k_start).clamp(-1, call.sizes[4] - 1) + 1
        low = torch.zeros_like(last) if call.window is None else (last - call.window).clamp(min=0)
        sight = upto[..., last] - upto[..., low]
        blind = sight == 0
        if call.row_live is not None:
            blind = blind & call.row_live[:, None]
        if bool(blind.any()):
            raise UsageError(
                f"after this edit some query of layer {self.site.layer} sees no key at all: leave it the first token, "
                "or take fewer keys away."
            )


def _both(coef: Tensor, group: Tensor, more: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two row-by-group biases as one: a group for each pair, coefficients added."""
    ours, theirs = coef.shape[-1] + 1, more.shape[-1] + 1
    other = other if other.dim() == 3 else other[:, None]
    pad = torch.nn.functional.pad
    total = pad(coef, (1, 0))[..., :, None] + pad(more, (1, 0))[..., None, :]
    return total.reshape(*total.shape[:-2], ours * theirs)[..., 1:], group * theirs + other


def spans_of(spans: Any) -> tuple[Where, ...]:
    """Spans as a user writes them: one name, position or range, or several of these. Raises SpanError."""
    from interp.hooks.keep import where_of

    several = isinstance(spans, list | tuple) and not (
        isinstance(spans, tuple) and len(spans) == 2 and all(type(part) is int for part in spans)
    )
    # a position as a range of one, so that two positions never read as a range when they are given again
    found = tuple((p, p + 1) if isinstance(p, int) else p for p in where_of(tuple(spans) if several else (spans,)))
    if not found:
        raise SpanError("no span was given: name at least one, as in 'mark'.")
    return found
