"""ZeroTuning: attention to the first token, up or down."""

import math
from dataclasses import dataclass

from interp.hooks.edit.edit import Edit, EditContext, check_positive
from interp.kernels.contract import Call


@dataclass(frozen=True)
class ZeroTuning(Edit):
    """Attention to the first real token multiplied by gamma and renormalised.

    pattern'[b h q 0] = gamma pattern / D, pattern'[b h q k] = pattern / D for k > 0, with
    D = 1 + (gamma - 1) pattern[b h q 0]: a bias of log gamma on the first token. gamma > 1 flattens what is left
    to the rest, gamma < 1 sharpens it.
    gamma > 0, 1 changes nothing. "First" is the first token of the prompt, never a column of padding. A learned sink
    (gpt-oss) keeps its logit, so its share moves too.
    Source: Han et al. 2505.11739, section 3.
    Cannot show: which heads gain from which direction; the paper labels them on held-out data.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("gamma", self.gamma)

    @property
    def is_noop(self) -> bool:
        return self.gamma == 1

    def apply(self, here: EditContext) -> Call:
        return here.add_key_bias(math.log(self.gamma), here.first_token)
