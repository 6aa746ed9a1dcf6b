"""ACT: attention is taken from sinks other than the first token and spread over the rest of the row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from interp.hooks.edit import Edit, Here
from interp.kernels.contract import Call
from interp.kernels.errors import UsageError


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
    threshold: float | str = "5/n"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta <= 1:
            raise UsageError(f"beta={self.beta} is not in (0, 1]: ACT takes 0.4 by default, 1 for nothing.")
        self._limit(torch.ones(1))

    @property
    def idle(self) -> bool:
        return self.beta == 1

    def change(self, here: Here) -> Call:
        sinks = self.sinks(here)
        if not bool(sinks.any()):
            return here.call
        s, rest = here.mass(sinks)
        # where a row sees sinks alone nothing could take what they lose
        alone = rest < 1e-6
        coefficient = torch.log(self.beta * rest.clamp(min=1e-6) / (1 - self.beta * s))
        return here.weighed(coefficient.masked_fill(alone, 0.0), sinks)

    def sinks(self, here: Here) -> Tensor:
        """Bool [b h k], found on the prompt and kept for the steps that follow."""
        keys = here.call.sizes[4]
        found = here.recall()
        if found is None or here.call.q_start <= here.call.k_start:
            lengths = torch.tensor(here.steering.bound.lengths(here.call.sizes[0]), device=here.call.q.device)
            position = here.row_position
            if here.call.q.shape[2] < int(lengths.max()):
                raise UsageError("ACT finds its sinks on the whole prompt: let it be read in one prefill.")
            received = here.columns((position >= 0) & (position < lengths[:, None]))
            above = received > self._limit(lengths)[:, None, None].to(received)
            inside = here.prompt() & ~here.first
            own = torch.zeros(here.call.sizes[1], dtype=torch.bool, device=above.device).index_fill(0, here.heads, True)
            found = above & inside[:, None] & own[:, None]
            here.note(found)
        # a cache may have dropped its oldest keys since, and has new ones
        found = found[..., here.call.k_start :][..., :keys]
        return torch.nn.functional.pad(found, (0, keys - found.shape[-1]))

    def _limit(self, lengths: Tensor) -> Tensor:
        if isinstance(self.threshold, str):
            number, _, n = self.threshold.partition("/")
            try:
                if n.strip() != "n":
                    raise ValueError
                return float(number) / lengths.float()
            except ValueError:
                raise UsageError(f"threshold={self.threshold!r} is neither a number nor of the form '5/n'.") from None
        return torch.full_like(lengths, self.threshold, dtype=torch.float32)
