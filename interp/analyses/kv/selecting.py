"""The keys that a selector keeps, while a model runs: hidden, or gone from its cache."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from interp.analyses.kv.selector import Kept, KeySelector
from interp.errors import UsageError
from interp.hooks.edit.edit import Steering, steering
from interp.hooks.model.layers import attention_layers
from interp.hooks.prompts.prompts import Prompts

EVERY = 64
"""new keys after which those that left a window are let go of: a compact cache holds at most so many more"""


@contextlib.contextmanager
def selecting(
    model: nn.Module,
    selector: KeySelector,
    prompts: Prompts | None,
    cache: Any = None,
    *,
    noted: dict[tuple[int, int], Kept] | None = None,
) -> Iterator[Steering]:
    """Let tokens after the prompt see only the keys that a selector keeps, in forward() with a cache or generate().

        cache = EvictingCache(model)
        with selecting(model, SnapKV(share=0.25), prompts, cache):
            model.generate(**prompts.tensors(), past_key_values=cache)

    cache: an EvictingCache, which then holds no other keys, layer by layer as the prompt is read; without one the keys
    are hidden and the memory stays. Both give the same tokens. Source: ours.
    noted: what the selector chose before, of a prompt that is in the model's cache already.
    Raises as `steering`, and UsageError for a selector without prompts, or for beams with a compact cache.
    Cannot show: speed; hidden keys are still multiplied, and a compact layer is laid out whole while it is called.
    """
    if prompts is None and not selector.is_noop:
        raise UsageError("a selector needs the prompts that run, to know where they end: pass them as prompts=.")
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(steering(model, selector, prompts))
        state.memory |= noted or {}
        if cache is not None and not selector.is_noop:

            def compact(layer: int) -> Any:
                def after(*_: Any) -> None:
                    chosen = state.memory.get((0, layer))
                    held = cache.layers[layer]
                    # a sliding layer drops its keys by itself
                    if chosen is None or not hasattr(held, "evict"):
                        return
                    length = torch.tensor(state.bound.lengths(len(chosen.kept)), device=chosen.kept.device)
                    if held.kept is None:
                        held.evict(_columns(chosen.kept, length))
                    elif chosen.window is not None and held.get_seq_length() - held.kept.shape[-1] >= EVERY:
                        start = chosen.kept.shape[-1] - length
                        held.evict(_last(chosen.window, start, selector.sink, held.get_seq_length()))

                return after

            for layer, module in attention_layers(model).items():
                handle = module.register_forward_hook(compact(layer))
                stack.callback(handle.remove)
        yield state


def _columns(kept: Bool[Tensor, "b g n"], length: Tensor) -> Bool[Tensor, "b g k"]:
    """From positions to the columns of a batch padded on the left."""
    n = kept.shape[-1]
    position = torch.arange(n, device=kept.device)[None] - (n - length)[:, None]
    place = position.clamp(min=0)[:, None].expand(-1, kept.shape[1], -1)
    return kept.gather(2, place) & (position >= 0)[:, None]


def _last(window: Int[Tensor, "b g"], start: Tensor, sink: int, columns: int) -> Bool[Tensor, "b g k"]:
    """The columns that the row after them, and every later one, may still see; start[b]: column of the first token."""
    position = torch.arange(columns, device=start.device) - start[:, None, None]
    next_row = columns - start[:, None, None]
    return (position >= 0) & ((position < sink) | (position >= next_row - window[..., None]))
