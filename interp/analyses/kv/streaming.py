"""Selectors that look at places alone, and the control that every other stands beside."""

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from interp.analyses.kv.selector import KeySelector
from interp.hooks.edit.edit import EditContext


@dataclass(frozen=True)
class Streaming(KeySelector):
    """The first keys and the last: StreamingLLM's cache, of which `full` heads are left out.

    kept[b g k] = k < sink or k >= q - (round(share n) - sink), n tokens of the prompt, q the row after it: as a reply
    grows, its first tokens leave too, so that the cache stays of one size; a window has at least `recent` keys.
    Source: Xiao et al. 2309.17453. Differs: the prompt is read whole; keys keep their positions, where the released
    code numbers them anew. Cannot show: what a model trained on such windows does.
    """

    @property
    def rolls(self) -> bool:
        return True

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        return _last(here)


@dataclass(frozen=True)
class RandomKeys(KeySelector):
    """Keys drawn at random, beside the first and the last: the control of every selector.

    Drawn anew for each prompt, by its tokens, and each layer and kv head, by `seed`. Source: ours.
    Cannot show: the spread over draws; use several seeds.
    """

    seed: int = 0

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        groups, position = here.call.sizes[2], here.key_position
        prompts: Any = here.steering.bound.prompts
        each = here.steering.bound.repeat(len(position))
        rows = []
        for row in range(len(position)):
            ids = prompts[row // each].ids
            draw = torch.Generator().manual_seed(crc32(repr((self.seed, here.site.layer, ids)).encode()))
            rows.append(torch.rand(groups, max(len(ids), 1), generator=draw))
        longest = max(row.shape[1] for row in rows)
        drawn = torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows])
        place = position.clamp(0, longest - 1).cpu()[:, None].expand(-1, groups, -1)
        return drawn.gather(2, place).to(position.device)


def _last(here: EditContext) -> Float[Tensor, "b g k"]:
    """Later keys first."""
    _, _, g, _, _ = here.call.sizes
    return here.key_position.clamp(min=0).float()[:, None].expand(-1, g, -1)
