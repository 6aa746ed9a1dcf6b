"""The cheap relatives of PASTA, ACT and ZeroTuning: what the same algebra gives for nothing."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, EditContext, GateInput, SpanEdit, check_positive
from interp.kernels.contract import Call

TINY = 1e-30
"""a share of attention that is as good as none"""


@dataclass(frozen=True)
class Boost(SpanEdit):
    """Attention to spans multiplied by `factor` and renormalised: a bias of log factor on their keys.

    With the instruction as the span and all heads it is InstABoost, with the evidence as the span and retrieval heads
    an evidence boost. factor > 0, 1 changes nothing. protect_first leaves the first token out.
    Source: Guardieiro et al. 2506.13734 (InstABoost).
    Cannot show: whether the text was read for what it says; a large factor degrades it.
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


@dataclass(frozen=True)
class SpotLight(SpanEdit):
    """Spans get at least a share `target` of each row: a row that gives psi < target is raised, others are left.

    The bias is log(target (1 - psi) / ((1 - target) psi)) on the spans, which gives them exactly `target`;
    exact=False takes the paper's log(target / psi), which ends a little below.
    Source: Venkateswaran et al. 2505.12025. Differs: psi is of each row and head, where the released code takes
    one for all.
    Cannot show: anything where a row gives the spans nothing at all; it is left as it is.
    """

    target: float = 0.1
    exact: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.target < 1:
            raise UsageError(f"target={self.target} is not in [0, 1): it is a share of attention, 0 changes nothing.")

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


@dataclass(frozen=True)
class Knockout(SpanEdit):
    """Spans cannot be attended to: a bias of -inf on their keys.

    Raises UsageError where a query would see no key at all, as the first tokens of a prompt do when a span holds them.
    Source: Geva et al. 2304.14767. Differs: keys are out for every row that sees them, not from chosen rows.
    Cannot show: that the information is gone; later tokens may hold it already.
    """

    def __post_init__(self) -> None:
        super().__post_init__()

    @property
    def leaves_prefix_unchanged(self) -> bool:
        return True

    def apply(self, here: EditContext) -> Call:
        return here.add_key_bias(-math.inf, here.keys(self.spans))


@dataclass(frozen=True)
class Temperature(Edit):
    """Logits of the heads divided by `temperature`: below 1 attention sharpens, above it flattens.

    pattern'[b h q k] = softmax over k of logits / temperature. temperature > 0, 1 changes nothing.
    Source: ours. Cannot show: which keys gain; a head that looks at the wrong ones looks at them harder.
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


@dataclass(frozen=True)
class Gate(Edit):
    """What the heads write multiplied by `factor`: 0 takes them out, 1 changes nothing.

    z'[b q h d] = factor z, before the output projection.
    Source: ours; the gate of Michel et al. 1905.10650, set by hand.
    Cannot show: what the model would do had it been trained with such heads; a factor moves the residual off its path.
    """

    factor: float = 1.0

    @property
    def is_noop(self) -> bool:
        return self.factor == 1

    @property
    def gate(self) -> Callable[[GateInput], Tensor]:
        return lambda output: output.z * self.factor
