"""Steering: edits that change attention while the model runs, as biases on its logits and never on its probabilities.

"Multiply by w and renormalise" is "add log w before the softmax". So every edit is one of four things: a bias on keys,
a coefficient for each row times a set of keys, a scale of the logits, or a gate on the output of a head, which may also
add to it.
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
from interp.hooks.edit.edit_context import EditContext
from interp.hooks.edit.open_edits import opened_once
from interp.hooks.edit.steering_state import GateInput, SteeringState
from interp.hooks.limits import parse_json, read_text, refusing
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import projection_inputs, unwrap
from interp.hooks.model.scope import Scope
from interp.hooks.prompts.batch_spans import BatchSpans, TokenSpan
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.reductions import normalize_spans
from interp.hooks.seam import AttentionTap, Seam, Site, tapping
from interp.hooks.writer import write_atomic
from interp.kernels.contract import Call


@dataclass(frozen=True)
class Edit:
    """Base class of the edits: the heads that an edit acts on, and its effect on an attention call.

    A subclass is a frozen dataclass whose fields are its settings. It overrides `apply`, to change attention, or
    `gate`, to change the outputs of heads. Edits add up: `a + b`.

    Args:
        heads: Heads to act on: anything that `HeadSet.parse` takes; stored as a string.

    Examples:
        >>> interp.steer.Boost("first", 2.0, heads="L0H1") + interp.steer.Temperature(0.5)
        Boost(heads='L0H1', spans=(...), ...) + Temperature(heads='all', temperature=0.5)
    """

    heads: str = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.heads, str):
            object.__setattr__(self, "heads", str(HeadSet.parse(self.heads)))

    def __add__(self, other: "Edit | Edits") -> "Edits":
        return Edits((self,)) + other

    @property
    def is_noop(self) -> bool:
        """Whether the settings change nothing, as with a factor of one; the model's own attention then runs."""
        return False

    def apply(self, here: "EditContext") -> Call:
        """Apply the edit to one attention call.

        Args:
            here: The call, its keys and rows by position, and methods that change it.

        Returns:
            Call: The changed call, or `here.call` for no change.
        """
        return here.call

    @property
    def gate(self) -> Callable[[GateInput], Tensor] | None:
        """Function from the outputs of heads to those that replace them; None for edits of attention."""
        return None

    @property
    def leaves_prefix_unchanged(self) -> bool:
        """Whether rows before the first key of the spans do not change, in a model without learned sinks."""
        return False

    @property
    def transferable(self) -> bool:
        """Whether the edit has the same meaning in other heads."""
        return True

    @property
    def needs_positions(self) -> bool:
        """Whether the gate needs the positions of its rows, which only the attention call has."""
        return False

    def chosen(self, layout: HeadLayout) -> HeadSet:
        """List the heads that the edit acts on in a model.

        Args:
            layout: The heads of the model.

        Returns:
            HeadSet: The heads.

        Raises:
            HeadError: If the model does not have a head.
        """
        return HeadSet.parse(self.heads, layout)

    def to_dict(self) -> dict[str, Any]:
        """Return the class name and the settings as plain data."""
        return {"edit": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class SpanEdit(Edit):
    """Base class of the edits that act on spans.

    Args:
        spans: Names of the prompts' spans, positions or ranges of positions (start, stop), one or several.
        heads: Heads to act on, as for `Edit`.
    """

    spans: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "spans", parse_spans(self.spans))


@dataclass(frozen=True)
class Edits:
    """Several edits in order, which can be printed, hashed, and saved as JSON.

    They act in this order: an edit that reads attention reads the attention that the edits before it leave.

    Args:
        edits: The edits.

    Examples:
        >>> edits = interp.steer.Temperature(0.5) + interp.steer.ZeroTuning(0.8, heads="L0H1")
        >>> interp.steer.load_edits(edits.save(folder / "edits.json")) == edits
        True
    """

    edits: tuple[Edit, ...] = ()

    def __add__(self, other: "Edit | Edits") -> "Edits":
        return Edits(self.edits + (other.edits if isinstance(other, Edits) else (other,)))

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.edits)) or "Edits()"

    def save(self, path: str | Path) -> Path:
        """Write the edits to a JSON file that `steer.load_edits` reads.

        Args:
            path: The file.

        Returns:
            Path: The file.

        Raises:
            UsageError: If the file cannot be written.
        """
        stored = json.dumps([edit.to_dict() for edit in self.edits], indent=1)
        return write_atomic(path, f"{stored}\n".encode(), UsageError)

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
            what = f"{kind.__name__} cannot be made from {sorted(entry)}"
            with refusing(what, UsageError, "give the fields that Edits.save wrote"):
                made.append(kind(**{name: _with_ranges(value) for name, value in entry.items() if name != "edit"}))
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
            stored = parse_json(read_text(path, UsageError))
        except ValueError as error:
            raise UsageError(f"{path} holds no saved edits ({error}); give a file that Edits.save wrote.") from None
        if not isinstance(stored, list) or not all(isinstance(entry, dict) for entry in stored):
            raise UsageError(f"{path} holds no saved edits; give a file that Edits.save wrote.")
        return cls.from_dicts(stored, find)


def _with_ranges(value: Any) -> Any:
    """Turn ranges that JSON stores as lists back into tuples; the list around them stays a list."""
    return [tuple(part) if isinstance(part, list) else part for part in value] if isinstance(value, list) else value


@contextlib.contextmanager
def steering(model: nn.Module, edits: "Edit | Edits", prompts: Prompts | None = None) -> Iterator["Steering"]:
    """Apply edits to a model's attention while the context is open, in forward() and generate() alike.

    Spans are bound once, to absolute positions. Prefill and decode have the same meaning: cached generation equals a
    full recompute at every token. Layers that no edit names run the model's own attention, and edits that change
    nothing leave the logits equal to the bit. With a cache that held tokens before the context was opened, positions
    count from the first token in the cache, and prompts are the whole text from there.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        edits: An edit, or a sum of edits.
        prompts: The batch that runs; needed for edits that name spans.

    Yields:
        Steering: The edits, bound to the model and the batch.

    Raises:
        HeadError: If the model does not have a head.
        SpanError: If no prompt has a span, or the batch is longer than the prompts. Only lengths are compared.
        UsageError: If edits is not an edit, is open on this model already, or leaves a query no key to see.
        ModelError: If the context ends and the model has not run in it, or ran where it cannot be edited.

    Examples:
        >>> edit = interp.steer.Pasta("first", alpha=0.01, heads="L0H1, L1H2")
        >>> with interp.steering(model, edit, prompts):
        ...     out = model.generate(**prompts.tensors(), max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
        >>> out.shape
        torch.Size([2, 19])

    Limits:
        Does not show what the heads did before; for that see `capture` and `ablation_test`.
    """
    model = unwrap(model)
    if not isinstance(edits, Edit | Edits):
        raise UsageError(f"{edits!r} is not an edit: give an edit of interp.steer, or a sum of edits.")
    steering = Steering(layout=HeadLayout.of(model), edits=Edits(()) + edits, bound=BatchSpans(prompts))
    acting: list[tuple[Scope, set[int]]] = []
    with contextlib.ExitStack() as stack:
        changing = [edit for edit, heads in steering.pairs if heads]
        stack.enter_context(opened_once(model, changing, "give edit + edit to apply it twice"))
        if tapped := steering.tapped_layers:
            steering.seam = stack.enter_context(tapping(model, steering))
            acting.append((steering.seam.scope_of(steering), tapped))
        if gated := {layer for edit, heads in steering.pairs if edit.gate is not None for layer in heads}:
            acting.append((stack.enter_context(projection_inputs(model, sorted(gated), steering.apply_gates)), gated))
        yield steering
    for scope, layers in acting:
        scope.check_reached(layers, "steering()")


@dataclass(eq=False, kw_only=True)
class Steering(SteeringState, AttentionTap):
    """The edits of one context, bound to a model and a batch; made by `steering`."""

    layout: HeadLayout
    edits: Edits
    seam: Seam | None = None
    _heads: list[dict[int, tuple[int, ...]]] = field(default_factory=list)
    """For each edit, its heads by layer."""
    _position: dict[int, Tensor] = field(default_factory=dict)
    """Int [b q] by layer, the positions of the rows of the attention call that just ran."""

    def __post_init__(self) -> None:
        for edit in self.edits:
            skipped = edit.is_noop or not edit.heads
            self._heads.append({} if skipped else edit.chosen(self.layout).by_layer())

    @property
    def pairs(self) -> Iterator[tuple[Edit, dict[int, tuple[int, ...]]]]:
        """Each edit with its heads by layer."""
        return zip(self.edits, self._heads, strict=True)

    @property
    def tapped_layers(self) -> set[int]:
        """The layers whose attention calls the edits need."""
        return {layer for edit, heads in self.pairs if edit.gate is None or edit.needs_positions for layer in heads}

    def at(self, layer: int) -> bool:
        return any(layer in heads for edit, heads in self.pairs if edit.gate is None or edit.needs_positions)

    def edit(self, site: Site) -> Call:
        self.bound.match(site)
        call = site.call
        for number, (edit, layers) in enumerate(self.pairs):
            heads = layers.get(site.layer)
            if heads and edit.gate is None:
                index = torch.tensor(heads, device=call.q.device)
                call = edit.apply(EditContext(replace(site, call=call), index, self, number))
            elif heads and edit.needs_positions:
                self._position[site.layer] = site.row_position
        return call

    def apply_gates(self, layer: int, x: Tensor) -> Tensor:
        """Replace the outputs of heads in x [b q h*d] by what the gates of the edits return."""
        z = x.unflatten(-1, (self.layout.heads, -1)).clone()
        position = self._position.pop(layer, None)
        for number, (edit, layers) in enumerate(self.pairs):
            heads = list(layers.get(layer, ()))
            if heads and edit.gate is not None:
                z[:, :, heads] = edit.gate(GateInput(z[:, :, heads], layer, heads, position, self, number))
        return z.flatten(-2)


def check_positive(name: str, value: Any) -> None:
    """Refuse a setting that is not a positive number.

    Args:
        name: Name of the setting.
        value: Its value.

    Raises:
        UsageError: If the value is not a finite number above 0.
    """
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{name}={value!r} is not a positive number: give a number above 0; 1 changes nothing.")


def parse_spans(spans: Any) -> tuple[TokenSpan, ...]:
    """Convert spans as a user writes them: one name, position or range, or a list of these.

    Args:
        spans: The spans.

    Returns:
        tuple: One entry per span: names, and ranges as pairs (start, stop).

    Raises:
        SpanError: If no span is given, or an entry is not a span.

    Examples:
        >>> from interp.hooks.edit.edit import parse_spans
        >>> parse_spans(["question", 3, (5, 9)])
        ('question', (3, 4), (5, 9))
    """
    several = isinstance(spans, list | tuple) and not (
        isinstance(spans, tuple) and len(spans) == 2 and all(type(part) is int for part in spans)
    )
    # a position becomes a range of one, so that two positions are never taken for a range when they are parsed again
    found = tuple(
        (p, p + 1) if isinstance(p, int) else p for p in normalize_spans(tuple(spans) if several else (spans,))
    )
    if not found:
        raise SpanError("no span was given: name at least one, as in 'mark'.")
    return found
