"""KeyScale: ZeroTuning's key-state variant, which scales the key of the first token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from interp.analyses.registry import edit
from interp.hooks.edit.edit import Edit, EditContext, check_positive
from interp.kernels.contract import Call

MAX_ROWS = 8192
"""queries held in float32 at once"""


@edit(title="Key scale", group="sinks", order=7)
@dataclass(frozen=True)
class KeyScale(Edit):
    """The key of the prompt's first token is multiplied by `factor`; the published form serves kernels without biases.

    The logit `z[b h q 0]` becomes `factor z[b h q 0]`, before a soft-cap. This is a bias of `cap(factor z) - cap(z)` on
    that key, one number for each row, so that query heads which share a key are changed separately and no key is
    copied. With all heads of a kv group it is the paper's form. In a sum of edits, temperatures belong before it.

    It is not ZeroTuning: its gamma becomes `exp((factor - 1) z[b h q 0])`, which differs from row to row and changes
    direction where z < 0. The same factor raises the attention to the first token for some queries and lowers it for
    others.

    Args:
        factor: Factor of the key, above 0; 1 changes nothing.
        heads: Heads to edit.

    Raises:
        UsageError: If `factor` is not a positive number.

    Examples:
        >>> edit = interp.steer.KeyScale(1.3, heads="L1")
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        Han et al. 2505.11739, the variant for fused kernels, which its authors call equivalent to ZeroTuning.

    Limits:
        Does not show the effect on a share of attention. Read `mass(0)` as well, or use ZeroTuning.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("factor", self.factor)

    @property
    def is_noop(self) -> bool:
        return self.factor == 1

    def apply(self, here: EditContext) -> Call:
        z = _first_logit(here)
        return here.add_row_bias(_capped(here.call, self.factor * z) - _capped(here.call, z), here.first_token)


def _first_logit(here: EditContext) -> Tensor:
    """Float `[b h q]`: logit of the first token before the soft-cap; of another key where the cache dropped it."""
    call = here.call
    b, h, g, _, n_keys = call.sizes
    first = here.site.text.columns(torch.zeros(b, 1, dtype=torch.int64, device=call.q.device))[:, 0]
    place = (first - call.k_start).clamp(0, n_keys - 1)
    key = call.k[torch.arange(b, device=place.device), :, place].to(call.dtype).repeat_interleave(h // g, 1)
    z = [torch.einsum("bhqd,bhd->bhq", part.to(call.dtype), key) for part in call.q.split(MAX_ROWS, 2)]
    scale = 1.0 if call.logit_scale is None else call.logit_scale.to(call.dtype).expand(b, h)[..., None]
    return torch.cat(z, -1) * call.scale * scale


def _capped(call: Call, z: Tensor) -> Tensor:
    return z if call.softcap is None else call.softcap * torch.tanh(z / call.softcap)
