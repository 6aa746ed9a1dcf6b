"""ZeroTuning's key-state variant: the key of the first token, longer or shorter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from interp.hooks.edit.edit import Edit, EditContext, check_positive
from interp.kernels.contract import Call

ROWS = 8192
"""queries held in float32 at once"""


@dataclass(frozen=True)
class KeyScale(Edit):
    """The key of the first real token multiplied by `factor`, for fast kernels that take no bias.

    z[b h q 0] -> factor z[b h q 0], before a soft-cap: a bias of cap(factor z) - cap(z) on that key, a number for each
    row, so that query heads which share a key are changed alone and no key is copied. With all heads of a kv group it
    is the paper's form; temperatures belong before it in a sum.
    Not ZeroTuning: its gamma becomes exp((factor - 1) z[b h q 0]), which differs from row to row and turns around where
    z < 0: the same factor raises the first token for some queries and lowers it for others.
    factor > 0, 1 changes nothing. Source: Han et al. 2505.11739, the fused variant, whose authors call it equivalent.
    Cannot show: what a share of attention does; read mass(0) beside it, or take ZeroTuning.
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
    """Float [b h q] logit of the first token before the soft-cap; of any key where the cache has dropped it."""
    call = here.call
    b, h, g, _, n_keys = call.sizes
    place = (here.site.first - call.k_start).clamp(0, n_keys - 1)
    key = call.k[torch.arange(b, device=place.device), :, place].to(call.dtype).repeat_interleave(h // g, 1)
    z = [torch.einsum("bhqd,bhd->bhq", part.to(call.dtype), key) for part in call.q.split(ROWS, 2)]
    scale = 1.0 if call.logit_scale is None else call.logit_scale.to(call.dtype).expand(b, h)[..., None]
    return torch.cat(z, -1) * call.scale * scale


def _capped(call: Call, z: Tensor) -> Tensor:
    return z if call.softcap is None else call.softcap * torch.tanh(z / call.softcap)
