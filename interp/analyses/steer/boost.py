"""Boost: marked spans get more attention, as in InstABoost."""

import math
from dataclasses import dataclass

from interp.analyses.registry import edit
from interp.hooks.edit.edit import EditContext, SpanEdit, check_positive
from interp.kernels.contract import Call


@edit(title="Boost", group="spans", order=2)
@dataclass(frozen=True)
class Boost(SpanEdit):
    """Attention to spans is multiplied by `factor` and renormalised.

    The new pattern is proportional to `factor pattern[b h q k]` on the spans and to `pattern[b h q k]` elsewhere. This
    is a bias of `log factor` on the keys of the spans. With the instruction as the span and all heads it is InstABoost;
    with the evidence as the span and retrieval heads it is an evidence boost.

    Args:
        spans: Names, positions or ranges of the spans.
        factor: Factor of the attention to the spans, above 0; 1 changes nothing.
        protect_first: Leave the first token unchanged.
        heads: Heads to edit.

    Raises:
        UsageError: If `factor` is not a positive number.

    Examples:
        >>> edit = interp.steer.Boost("first", factor=6.0)
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        Guardieiro et al. 2506.13734 (InstABoost).

    Limits:
        Does not show that the meaning of the text is used. A large factor degrades it.
    """

    factor: float = 4.0
    protect_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("factor", self.factor)

    @property
    def is_noop(self) -> bool:
        return self.factor == 1

    @property
    def leaves_prefix_unchanged(self) -> bool:
        return True

    def apply(self, here: EditContext) -> Call:
        marked = here.keys(self.spans)
        return here.add_key_bias(math.log(self.factor), marked & ~here.first_token if self.protect_first else marked)
