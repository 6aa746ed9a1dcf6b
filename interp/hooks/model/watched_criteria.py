"""Watches of the loops that generate text, in transformers and in TransformerLens, which note where each row ends."""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList

from interp.hooks.model.row_ends import Generation, NotedEnds

BRIDGE_MODULE = "transformer_lens.model_bridge.transformer_bridge"


class WatchedCriteria(StoppingCriteriaList):
    """The stopping criteria of one generate(), which note where each row ends."""

    def __init__(self, criteria: StoppingCriteriaList, generation: Generation) -> None:
        super().__init__(criteria)
        self._criteria, self._generation = criteria, generation
        self.noted = NotedEnds()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = self._criteria(input_ids, scores, **kwargs)
        self.noted.step(done, self._generation.seen)
        return done


class FinishedRows(NotedEnds):
    """The ends of rows in the loop of a TransformerLens bridge, which marks in a tensor the rows that have ended."""

    def __init__(self, finished: Tensor) -> None:
        super().__init__()
        self._finished = finished

    def before(self, seen: int) -> None:
        self.step(self._finished, seen)


def watch_generation(find: Callable[[nn.Module], Generation | None]) -> Callable[[], None]:
    """Note the ends of rows in every generate() of a model that `find` knows.

    Beam search is left alone: its criteria concern candidates, which are no rows of the batch.

    Args:
        find: Function from a model to its generation; None for a model that is not watched.

    Returns:
        A function that stops the watch.
    """
    # pyright binds the method to a protocol that the class itself does not fulfil
    mixin: Any = GenerationMixin
    original = mixin._get_stopping_criteria

    @functools.wraps(original)
    def watched(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = original(self, generation_config, *args, **kwargs)
        generation = find(self)
        if generation is None or (generation_config.num_beams or 1) > 1:
            return criteria
        made = WatchedCriteria(criteria, generation)
        # generate() alone holds the list, so that the ends are gone when it returns
        generation.begin(made.noted)
        return made

    mixin._get_stopping_criteria = watched
    stop_bridge = _watch_bridge(find)

    def stop() -> None:
        mixin._get_stopping_criteria = original
        stop_bridge()

    return stop


def _watch_bridge(find: Callable[[nn.Module], Generation | None]) -> Callable[[], None]:
    """Note the ends of rows in generate() of TransformerLens bridges, where that library has been imported."""
    bridge: Any = getattr(sys.modules.get(BRIDGE_MODULE), "TransformerBridge", None)
    original = getattr(bridge, "_generate_tokens", None)
    if original is None:
        return lambda: None

    @functools.wraps(original)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        generation, finished = find(self.original_model), kwargs.get("finished_sequences")
        # a local of the loop, so that the ends are gone when it is over
        noted = None if finished is None else FinishedRows(finished)
        if generation is not None and noted is not None:
            generation.begin(noted)
        yield from original(self, *args, **kwargs)

    def stop() -> None:
        bridge._generate_tokens = original

    bridge._generate_tokens = watched
    return stop
