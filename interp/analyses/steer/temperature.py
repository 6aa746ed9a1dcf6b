"""Temperature: the attention of heads is sharpened or flattened."""

from dataclasses import dataclass

from interp.analyses.registry import edit
from interp.hooks.edit.edit import Edit, EditContext, check_positive
from interp.kernels.contract import Call


@edit(title="Temperature", group="sharpness", order=10)
@dataclass(frozen=True)
class Temperature(Edit):
    """The logits of the heads are divided by `temperature`: below 1 attention sharpens, above 1 it flattens.

    The new pattern is `softmax over k of logits[b h q k] / temperature`.

    Args:
        temperature: Divisor of the logits, above 0; 1 changes nothing.
        heads: Heads to edit.

    Raises:
        UsageError: If `temperature` is not a positive number.

    Examples:
        >>> edit = interp.steer.Temperature(0.5, heads="L1")
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        This package.

    Limits:
        Does not show which keys gain. A head that attends to the wrong keys attends to them more sharply.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)

    @property
    def is_noop(self) -> bool:
        return self.temperature == 1

    def apply(self, here: EditContext) -> Call:
        return here.scale_logits(1 / self.temperature)
