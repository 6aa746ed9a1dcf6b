"""State that the edits of one steering context share, and the outputs of heads that a gate sees."""

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from interp.hooks.model.row_text import RowText
from interp.hooks.prompts.batch_spans import BatchSpans


@dataclass(eq=False, kw_only=True)
class SteeringState:
    """State that the edits of one steering context share: the batch and their notes."""

    bound: BatchSpans
    memory: dict[tuple[int, int], Any] = field(default_factory=dict)
    """Notes of an edit about the rows of the batch, by (number of the edit, layer)."""
    constants: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Tensors of an edit that do not depend on the batch, by (number of the edit, layer)."""
    shared: dict[Any, tuple[tuple[int, ...], RowText, Tensor]] = field(default_factory=dict)
    """Tensors that depend only on the positions of keys and rows: made once per forward pass, for all layers."""
    _warned: set[int] = field(default_factory=set)

    def warn(self, number: int, text: str) -> None:
        """Warn about an edit, by its number, once per context."""
        if number not in self._warned:
            self._warned.add(number)
            warnings.warn(text, stacklevel=2)


@dataclass(eq=False)
class GateInput:
    """The outputs of some heads of a layer, as a gate sees them."""

    z: Tensor
    """[b q n d], at the input of the output projection."""
    layer: int
    heads: list[int]
    row_position: Tensor | None
    """Int [b q]; None if no edit of the context needs positions."""
    steering: SteeringState
    number: int
    """Number of the edit in its steering context."""
