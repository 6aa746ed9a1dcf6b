"""Gate: the outputs of heads are scaled."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from interp.analyses.registry import edit
from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, GateInput


@edit(title="Gate", group="outputs", order=11)
@dataclass(frozen=True)
class Gate(Edit):
    """The outputs of the heads are multiplied by `factor`: 0 ablates them, 1 changes nothing.

    `z'[b q h d] = factor z[b q h d]`, before the output projection.

    Args:
        factor: Factor of the output.
        heads: Heads to edit.

    Raises:
        UsageError: If `factor` is not a finite number.

    Examples:
        >>> edit = interp.steer.Gate(0.0, heads="L1H2")
        >>> with interp.steering(model, edit):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        This package, after the gates of Michel et al. 1905.10650, set by hand.

    Limits:
        Does not show how a model trained with such heads would behave. A factor moves the residual stream to values
        that the model has not seen.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.factor, int | float) or not math.isfinite(self.factor):
            raise UsageError(f"factor={self.factor!r} is not a finite number; give one, such as 0.5.")

    @property
    def is_noop(self) -> bool:
        return self.factor == 1

    @property
    def gate(self) -> Callable[[GateInput], Tensor]:
        return lambda output: output.z * self.factor
