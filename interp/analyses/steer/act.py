"""ACT: attention is taken from sinks other than the first token and spread over the rest of the row."""

from dataclasses import dataclass

import torch

from interp.analyses.steer._sinks import Threshold, limit, sinks
from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, EditContext
from interp.kernels.contract import Call


@dataclass(frozen=True)
class Act(Edit):
    """Attention calibration: sinks that a prompt shows are cut to beta of their attention, the rest of a row gains.

    Sinks of a head: keys k > 0 whose mean over the rows q that see them, mean of pattern[b h q k], is above the
    threshold. With s = sum over sinks of pattern[b h q k]: pattern' = beta pattern on sinks and
    (1 - beta s) / (1 - s) pattern elsewhere, which is a bias of log(beta (1 - s) / (1 - beta s)) on sinks: a number for
    each row, times a set of keys for each head.
    beta in (0, 1], 0.4 in the paper, 1 changes nothing; threshold: "5/n" in the paper, a number for an absolute one
    (the released scripts take 0.1). Sinks are found once, on the prompt; a row that sees nothing else is left alone.
    Needs the whole prompt in one prefill. Source: Yu et al. 2406.15765. Differs: sinks are per prompt of a batch, and
    decode steps keep the prompt's, where the released code computes them anew from one row.
    Cannot show: that the sinks are idle; the first token, a sink as a rule, receives most of what is freed.
    """

    beta: float = 0.4
    threshold: Threshold = "5/n"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta <= 1:
            raise UsageError(f"beta={self.beta} is not in (0, 1]: ACT takes 0.4 by default, 1 for nothing.")
        limit(self.threshold, torch.ones(1))

    @property
    def is_noop(self) -> bool:
        return self.beta == 1

    def apply(self, here: EditContext) -> Call:
        on = sinks(here, self.threshold)
        if not bool(on.any()):
            return here.call
        s, rest = here.mass(on)
        # where a row sees sinks alone nothing could take what they lose
        alone = rest < 1e-6
        coefficient = torch.log(self.beta * rest.clamp(min=1e-6) / (1 - self.beta * s))
        return here.add_row_bias(coefficient.masked_fill(alone, 0.0), on)
