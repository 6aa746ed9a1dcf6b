"""Steering: attention re-weighted while the model runs, as biases on its logits, never as an edit of probabilities.

"Multiply by w and renormalise" is "add log w before the softmax", so every edit is a bias on keys, a coefficient for
each row times a set of keys, a scale of the logits, or a gate on what a head writes, which may add to it too.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import SpanError, UsageError
from interp.hooks.edit.edit_context import EditContext, Notes, Output
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import plain, projection_inputs
from interp.hooks.prompts.batch_spans import BatchSpans, Where
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.seam import AttentionTap, Seam, Site, tapping
from interp.kernels.contract import Call


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
    def is_noop(self) -> bool:
        """Whether the edit changes nothing by its own settings, as with a factor of one."""
        return False

    def apply(self, here: "EditContext") -> Call:
        """The call with the edit in it, or the call as it is."""
        return here.call

    @property
    def gate(self) -> Callable[[Output], Tensor] | None:
        """What the heads write instead, made from what they wrote; None for edits of attention."""
        return None

    @property
    def leaves_prefix_unchanged(self) -> bool:
        """Whether rows before the first key of its spans stay as they are, in a model without learned sinks."""
        return False

    @property
    def transferable(self) -> bool:
        """Whether it means the same in other heads."""
        return True

    @property
    def placed(self) -> bool:
        """Whether its gate asks for positions, which only the attention call knows."""
        return False

    def chosen(self, layout: HeadLayout) -> HeadSet:
        """The heads it acts on in a model. Raises HeadError."""
        return HeadSet.parse(self.heads, layout)

    def to_dict(self) -> dict[str, Any]:
        return {"edit": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Marked(Edit):
    """Base of the edits that name spans: names, positions or ranges, one or several."""

    spans: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "spans", spans_of(self.spans))


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
    def from_dicts(cls, entries: Iterable[Mapping[str, Any]], find: Callable[[str], "type[Edit] | None"]) -> "Edits":
        """The edits that `Edit.to_dict` wrote, in order.

        Args:
            entries: Dictionaries of fields, with the class name as "edit".
            find: Class name -> class, None for an unknown one; `steer.load_edits` passes the declared classes.

        Raises:
            UsageError: For an unknown class, or fields that it does not have.
        """
        made = []
        for entry in entries:
            kind = find(str(entry.get("edit")))
            if kind is None:
                raise UsageError(f"unknown edit {entry.get('edit')!r}; install or import the package that defines it.")
            try:
                made.append(kind(**{name: _listed(value) for name, value in entry.items() if name != "edit"}))
            except TypeError as error:
                raise UsageError(f"{kind.__name__} cannot be made from {sorted(entry)} ({error}).") from None
        return cls(tuple(made))

    @classmethod
    def load(cls, path: str | Path, find: Callable[[str], "type[Edit] | None"]) -> "Edits":
        """Read the edits that `save` wrote.

        Args:
            path: The JSON file.
            find: As in `from_dicts`.

        Raises:
            UsageError: For a file that holds no edits, or an unknown one.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} holds no saved edits ({error}); give a file that Edits.save wrote.") from None
        if not isinstance(stored, list) or not all(isinstance(entry, dict) for entry in stored):
            raise UsageError(f"{path} holds no saved edits; give a file that Edits.save wrote.")
        return cls.from_dicts(stored, find)


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
    Cannot show: what the heads were doing before; see capture and ablation_test.
    """
    model = plain(model)
    if not isinstance(edits, Edit | Edits):
        raise UsageError(f"{edits!r} is no edit: give one of interp.steer, or several added up.")
    steering = Steering(layout=HeadLayout.of(model), edits=Edits(()) + edits, bound=BatchSpans(prompts))
    with contextlib.ExitStack() as stack:
        if steering.tapped:
            steering.seam = stack.enter_context(tapping(model, steering))
        if gated := {layer for edit, heads in steering.pairs if edit.gate is not None for layer in heads}:
            stack.enter_context(projection_inputs(model, sorted(gated), steering.gated))
        yield steering


@dataclass(eq=False, kw_only=True)
class Steering(Notes, AttentionTap):
    """Edits of one context, bound to a model and a batch."""

    layout: HeadLayout
    edits: Edits
    seam: Seam | None = None
    _heads: list[dict[int, tuple[int, ...]]] = field(default_factory=list)
    """heads by layer, of each edit"""
    _position: dict[int, Tensor] = field(default_factory=dict)
    """Int [b q] of the rows that a layer's attention just saw"""

    def __post_init__(self) -> None:
        for edit in self.edits:
            idle = edit.is_noop or not edit.heads
            self._heads.append({} if idle else edit.chosen(self.layout).by_layer())

    @property
    def pairs(self) -> Iterator[tuple[Edit, dict[int, tuple[int, ...]]]]:
        """Each edit and its heads by layer."""
        return zip(self.edits, self._heads, strict=True)

    @property
    def tapped(self) -> set[int]:
        """The layers whose attention calls are seen."""
        return {layer for edit, heads in self.pairs if edit.gate is None or edit.placed for layer in heads}

    def at(self, layer: int) -> bool:
        return any(layer in heads for edit, heads in self.pairs if edit.gate is None or edit.placed)

    def edit(self, site: Site) -> Call:
        self.bound.match(site)
        call = site.call
        for number, (edit, layers) in enumerate(self.pairs):
            heads = layers.get(site.layer)
            if heads and edit.gate is None:
                index = torch.tensor(heads, device=call.q.device)
                call = edit.apply(EditContext(replace(site, call=call), index, self, number))
            elif heads and edit.placed:
                self._position[site.layer] = call.rows[None] - site.first[:, None]
        return call

    def gated(self, layer: int, x: Tensor) -> Tensor:
        """x [b q h*d] with what gates make of the outputs of their heads."""
        z = x.unflatten(-1, (self.layout.heads, -1)).clone()
        position = self._position.pop(layer, None)
        for number, (edit, layers) in enumerate(self.pairs):
            heads = list(layers.get(layer, ()))
            if heads and edit.gate is not None:
                z[:, :, heads] = edit.gate(Output(z[:, :, heads], layer, heads, position, self, number))
        return z.flatten(-2)


def positive(name: str, value: Any) -> None:
    """Raise UsageError for a setting that is not a positive number."""
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{name}={value!r} is not a positive number: give one; 1 changes nothing.")


def spans_of(spans: Any) -> tuple[Where, ...]:
    """Spans as a user writes them: one name, position or range, or several of these. Raises SpanError."""
    from interp.hooks.read.keep import where_of

    several = isinstance(spans, list | tuple) and not (
        isinstance(spans, tuple) and len(spans) == 2 and all(type(part) is int for part in spans)
    )
    # a position as a range of one, so that two positions never read as a range when they are given again
    found = tuple((p, p + 1) if isinstance(p, int) else p for p in where_of(tuple(spans) if several else (spans,)))
    if not found:
        raise SpanError("no span was given: name at least one, as in 'mark'.")
    return found
