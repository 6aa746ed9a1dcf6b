"""Random keys: the control of every selector."""

from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from interp.analyses.kv.selector import KeySelector
from interp.analyses.registry import selector
from interp.hooks.edit.edit import EditContext


@selector(name="random_keys", title="Random keys", order=0, baseline=True)
@dataclass(frozen=True)
class RandomKeys(KeySelector):
    """Random keys between the first and the last ones: the control of every selector.

    They are drawn for each prompt by its tokens, and for each layer and kv head by `seed`. The control of a selector
    keeps the same first and last keys as the selector, see `control_of`.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: Number of first keys, which are part of `keep_ratio` and kept before all other keys.
        n_recent: Number of last keys, which are part of `keep_ratio` and kept before the ranked keys.
        full_cache_heads: Heads whose kv heads keep everything.
        seed: Seed of the draw.

    Source:
        This package.

    Limits:
        Does not show the spread over draws; use several seeds.
    """

    seed: int = 0

    def control_of(self, selector: KeySelector) -> "RandomKeys":
        """The same draw with the share, and the first and last keys, of another selector.

        Args:
            selector: The selector to compare with.

        Returns:
            RandomKeys: the control.
        """
        first, last = selector.forced
        return replace(self, keep_ratio=selector.keep_ratio, n_sink=first, n_recent=last)

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        """A random number for each key."""
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
