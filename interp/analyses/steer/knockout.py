"""Knockout: marked spans cannot be attended to."""

import math
from dataclasses import dataclass

from interp.analyses.registry import edit
from interp.hooks.edit.edit import EditContext, SpanEdit
from interp.kernels.contract import Call


@edit(title="Knockout", group="spans", order=5)
@dataclass(frozen=True)
class Knockout(SpanEdit):
    """Spans get no attention: a bias of -inf on their keys.

    Args:
        spans: Names, positions or ranges of the spans.
        heads: Heads to edit.

    Raises:
        UsageError: While the model runs, if a query would see no key at all, as the first tokens of a prompt do when
            they belong to the span.

    Examples:
        >>> edit = interp.steer.Knockout((2, 5), heads="L1")
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        Geva et al. 2304.14767.

    Differs:
        The keys are hidden from every row that sees them, not from chosen rows.

    Limits:
        Does not show that the information is gone. Later tokens may hold it already.
    """

    def __post_init__(self) -> None:
        super().__post_init__()

    @property
    def leaves_prefix_unchanged(self) -> bool:
        return True

    def apply(self, here: EditContext) -> Call:
        return here.add_key_bias(-math.inf, here.keys(self.spans))
