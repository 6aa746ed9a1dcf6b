"""SpotLight: marked spans get at least a given share of each row."""

from dataclasses import dataclass

import torch

from interp.analyses.registry import edit
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext, SpanEdit
from interp.kernels.contract import Call

TINY = 1e-30
"""a share of attention that counts as zero"""


@edit(title="SpotLight", group="spans", order=3)
@dataclass(frozen=True)
class SpotLight(SpanEdit):
    """Spans get at least the share `target` of each row: a row that gives them less is raised, others are unchanged.

    With `psi = sum over the spans of pattern[b h q k]`, a row with `psi < target` gets a bias of
    `log(target (1 - psi) / ((1 - target) psi))` on the spans, which then have exactly the share `target`.

    Args:
        spans: Names, positions or ranges of the spans.
        target: Least share of attention, in [0, 1); 0 changes nothing.
        exact: False uses the paper's bias `log(target / psi)`, which gives slightly less than `target`.
        heads: Heads to edit.

    Raises:
        UsageError: If `target` is out of range.

    Examples:
        >>> edit = interp.steer.SpotLight("first", target=0.3)
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        Venkateswaran et al. 2505.12025.

    Differs:
        `psi` belongs to each row and head. The released code uses one value for all.

    Limits:
        Cannot raise a row that gives the spans no attention at all; it is unchanged.
    """

    target: float = 0.1
    exact: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.target < 1:
            raise UsageError(f"target={self.target} is not in [0, 1); give a share of attention, such as 0.1.")

    @property
    def is_noop(self) -> bool:
        return self.target == 0

    @property
    def leaves_prefix_unchanged(self) -> bool:
        return True

    def apply(self, here: EditContext) -> Call:
        marked = here.keys(self.spans)
        psi, rest = here.mass(marked)
        raised = (psi > TINY) & (psi < self.target)
        odds = rest / (1 - self.target) if self.exact else torch.ones_like(rest)
        coefficient = torch.log(self.target / psi.clamp(min=TINY) * odds.clamp(min=TINY))
        return here.add_row_bias(torch.where(raised, coefficient, 0.0), marked)
