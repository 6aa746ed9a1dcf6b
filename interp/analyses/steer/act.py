"""ACT: attention is moved from sinks other than the first token to the rest of the row."""

from dataclasses import dataclass

import torch

from interp.analyses.registry import edit
from interp.analyses.steer._sinks import Threshold, between, check_skipped, limit, sinks
from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, EditContext
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.kernels.contract import Call


@edit(title="ACT", group="sinks", order=4)
@dataclass(frozen=True)
class Act(Edit):
    """Attention calibration: sinks keep the share `beta` of their attention, and the rest of each row gains.

    The sinks of a head are the keys k > 0 whose mean of `pattern[b h q k]` over the rows q that see them is above the
    threshold. With `s = sum over sinks of pattern[b h q k]`, the new pattern is `beta pattern` on sinks and
    `(1 - beta s) / (1 - s) pattern` elsewhere. This is a bias of `log(beta (1 - s) / (1 - beta s))` on sinks: one
    number for each row, on a set of keys for each head.

    The sinks are found once, on the prompt, which must be read in one prefill. A row that sees only sinks is unchanged.

    Args:
        beta: Share of their attention that sinks keep, in [0, 1]. The paper uses 0.4; 0 hides the sinks, and 1 changes
            nothing.
        threshold: Mean attention above which a key is a sink. "5/n", as in the paper, is 5 divided by the number of
            keys that a row can see: the length of each prompt, or the window of the layer where that is shorter. The
            released scripts use 0.1.
        skip_first: Number of first layers whose heads are not edited; the paper leaves out 2.
        skip_last: Number of last layers whose heads are not edited; the paper leaves out 1.
        heads: Heads to edit.

    Raises:
        UsageError: If a setting is out of range.

    Examples:
        >>> edit = interp.steer.Act(beta=0.4, heads="L1")
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        Yu et al. 2406.15765.

    Differs:
        No layer is left out by default. Each prompt of a batch has its own sinks, and decode steps use those of the
        prompt. The released code computes them again from a single row.

    Limits:
        Does not show that the sinks are idle. The first token, which is usually a sink too, receives most of the freed
        attention.
    """

    beta: float = 0.4
    threshold: Threshold = "5/n"
    skip_first: int = 0
    skip_last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise UsageError(f"beta={self.beta} is not in [0, 1]; give the share that sinks keep, such as 0.4.")
        limit(self.threshold, torch.ones(1))
        check_skipped(skip_first=self.skip_first, skip_last=self.skip_last)

    @property
    def is_noop(self) -> bool:
        return self.beta == 1

    def chosen(self, layout: HeadLayout) -> HeadSet:
        return between(super().chosen(layout), layout, self.skip_first, self.skip_last)

    def apply(self, here: EditContext) -> Call:
        on = sinks(here, self.threshold)
        if not bool(on.any()):
            return here.call
        s, rest = here.mass(on)
        # in a row that sees only sinks no other key could take what they lose
        alone = rest < 1e-6
        coefficient = torch.log(self.beta * rest.clamp(min=1e-6) / (1 - self.beta * s))
        return here.add_row_bias(coefficient.masked_fill(alone, 0.0), on)
