"""Stopping criteria of generate() that note where each row of the batch ends."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList

from interp.hooks.model.row_ends import Generation

OPEN = 1 << 62
"""End of a row that has not ended."""


class WatchedCriteria(StoppingCriteriaList):
    """The stopping criteria of one generate(), which note where each row ends."""

    def __init__(self, criteria: StoppingCriteriaList, generation: Generation) -> None:
        super().__init__(criteria)
        self._criteria, self._generation = criteria, generation
        self.ends: Tensor | None = None
        self.seen = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = self._criteria(input_ids, scores, **kwargs)
        self.seen = self._generation.seen
        if self.ends is not None or bool(done.any()):
            before = torch.full(done.shape, OPEN, device=done.device) if self.ends is None else self.ends
            # the token that ends a row would be fed next, and no text follows from it
            self.ends = torch.where(done & (before == OPEN), self.seen, before)
        return done


def watch_generation(find: Callable[[nn.Module], Generation | None]) -> Callable[[], None]:
    """Note the ends of rows in every generate() of a model that `find` knows.

    Beam search is left alone: its criteria concern candidates, which are no rows of the batch.

    Args:
        find: Function from a model to its generation; None for a model that is not watched.

    Returns:
        A function that stops the watch.
    """
    original = GenerationMixin._get_stopping_criteria

    @functools.wraps(original)
    def watched(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = original(self, generation_config, *args, **kwargs)
        generation = find(self)
        if generation is None or (generation_config.num_beams or 1) > 1:
            return criteria
        made = WatchedCriteria(criteria, generation)
        generation.begin(made)
        return made

    def stop() -> None:
        GenerationMixin._get_stopping_criteria = original

    GenerationMixin._get_stopping_criteria = watched
    return stop
