"""ZeroTuning: attention to the first token is raised or lowered."""

import math
from dataclasses import dataclass

from interp.analyses.registry import edit
from interp.hooks.edit.edit import Edit, EditContext, check_positive
from interp.kernels.contract import Call


@edit(title="ZeroTuning", group="sinks", order=6, tuned={"gamma": (0.2, 0.5, 2.0, 5.0)})
@dataclass(frozen=True)
class ZeroTuning(Edit):
    """Attention to the first token of the prompt is multiplied by `gamma` and renormalised.

    The new pattern is `gamma pattern[b h q 0] / D` on the first token and `pattern[b h q k] / D` for k > 0, where
    `D = 1 + (gamma - 1) pattern[b h q 0]`. This is a bias of `log gamma` on the first token. With gamma above 1
    the attention to the other keys flattens, since their differences shrink; with gamma below 1 it sharpens.

    "First" is the first token of the prompt, never padding. A learned sink (gpt-oss) keeps its logit, so its share
    changes too.

    Args:
        gamma: Factor of the attention to the first token, above 0; 1 changes nothing. A steering run chooses it on the
            dev split where it is not given.
        heads: Heads to edit.

    Raises:
        UsageError: If `gamma` is not a positive number.

    Examples:
        >>> edit = interp.steer.ZeroTuning(2.0, heads="L1")
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        Han et al. 2505.11739, section 3.

    Limits:
        Does not show which heads gain from which direction. The paper labels them on held-out data, see
        `steer.directions`.
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
