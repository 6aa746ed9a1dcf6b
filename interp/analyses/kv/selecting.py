"""The context in which a selector acts on a model: other keys are hidden, or evicted from the cache."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from interp.analyses.kv._shares import NO_GLOBAL_LAYERS, global_layers
from interp.analyses.kv.selector import KeptKeys, KeySelector
from interp.errors import UsageError
from interp.hooks.edit.edit import Steering, steering
from interp.hooks.model.layers import attention_layers, unwrap
from interp.hooks.model.scope import ModuleHook, module_hooks
from interp.hooks.prompts.prompts import Prompts

EVICTION_INTERVAL = 64
"""new keys after which keys outside of a rolling window are evicted; an evicting cache holds at most this many more"""


@contextlib.contextmanager
def selecting(
    model: nn.Module,
    selector: KeySelector,
    prompts: Prompts | None,
    cache: Any = None,
    *,
    noted: dict[tuple[int, int], KeptKeys] | None = None,
) -> Iterator[Steering]:
    """Restrict tokens after the prompt to the keys that a selector keeps, in forward() with a cache or in generate().

    With an evicting cache the other keys are not stored. Without one they are hidden, and the memory does not change.
    Both give the same tokens.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        selector: The selector.
        prompts: The batch that runs, so that the end of each prompt is known.
        cache: The cache that runs, an `EvictingCache`, from which keys are evicted layer by layer as the prompt is
            read. It cannot be used after the context, except in another one with its choices as `noted`.
        noted: Earlier choices of the selector, by (0, layer), for a prompt that is already in the model's cache: the
            `memory` of the context before.

    Yields:
        Steering: its `memory[0, layer]` holds the KeptKeys of a layer.

    Raises:
        UsageError: For a selector without prompts, a cache that cannot evict keys or has evicted those of another
            context, a model in which every layer has a sliding window, or beams with an evicting cache; else as
            `steering`.

    Examples:
        >>> from interp.analyses.kv import SnapKV, selecting
        >>> from interp.hooks.edit.evicting_cache import EvictingCache
        >>> cache = EvictingCache(model)
        >>> with selecting(model, SnapKV(0.5, n_sink=1, n_recent=2, window=4), prompts, cache) as state:
        ...     tokens = model.generate(**prompts.tensors(), max_new_tokens=2, past_key_values=cache)
        >>> state.memory[0, 1].kept.shape
        torch.Size([2, 2, 17])

    Source:
        This package.

    Limits:
        Does not show the speed of a cache that evicts keys. Hidden keys are still multiplied, and an evicting layer is
        laid out whole while it is called.
    """
    if prompts is None and not selector.is_noop:
        raise UsageError("a selector needs the prompts that run, to know where they end; pass them as prompts=.")
    if not selector.is_noop and not bool(global_layers(unwrap(model), 1).any()):
        raise UsageError(NO_GLOBAL_LAYERS)
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(steering(model, selector, prompts))
        state.memory |= noted or {}
        if cache is not None and not selector.is_noop:
            stack.callback(_hide(cache, state))
            modules = attention_layers(model).items()
            hooks = [ModuleHook(m, _evicting(cache, layer, selector, state), after=True) for layer, m in modules]
            stack.enter_context(module_hooks(hooks))
        yield state


def _hide(cache: Any, state: Steering) -> Callable[[], None]:
    """Let the layers of a cache be used while a context hides the keys that they evict; a function that ends it."""
    # this imports transformers
    from interp.hooks.edit.evicting_cache import EvictingCache, EvictingLayer, Hiding

    if not isinstance(cache, EvictingCache):
        raise UsageError(
            f"cache={type(cache).__name__} cannot evict keys; give an EvictingCache(model), or leave cache out to hide "
            "the keys in any cache."
        )
    layers = {layer: held for layer, held in enumerate(cache.layers) if isinstance(held, EvictingLayer)}
    if any(held.has_evicted and (0, layer) not in state.memory for layer, held in layers.items()):
        raise UsageError(
            "this EvictingCache has evicted keys of an earlier context; give the memory of that context as noted=, or "
            "a new cache."
        )
    hiding = Hiding()
    for held in layers.values():
        held.hiding = hiding

    def end() -> None:
        hiding.active = False

    return end


def _evicting(cache: Any, layer: int, selector: KeySelector, state: Steering) -> Callable[..., None]:
    """A hook that evicts the keys of a layer after it was called."""
    from interp.hooks.edit.evicting_cache import EvictingLayer

    def after(*_: Any) -> None:
        chosen = state.memory.get((0, layer))
        held = cache.layers[layer]
        # a sliding layer drops its keys by itself
        if chosen is None or not isinstance(held, EvictingLayer):
            return
        if not held.get_seq_length():
            raise UsageError(
                "the model does not use the EvictingCache that selecting() was given; pass it as past_key_values=."
            )
        length = torch.tensor(state.bound.lengths(len(chosen.kept)), device=chosen.kept.device)
        text: Any = state.bound.text
        position = text.position.to(chosen.kept.device)
        if held.kept is None:
            held.evict(_columns(chosen.kept, length, position))
        elif chosen.window is not None and held.get_seq_length() - held.kept.shape[-1] >= EVICTION_INTERVAL:
            held.evict(_in_window(chosen.window, position, selector.n_sink))

    return after


def _columns(
    kept: Bool[Tensor, "b g n"], length: Int[Tensor, "b"], position: Int[Tensor, "b k"]
) -> Bool[Tensor, "b g k"]:
    """From positions of the prompt to the columns of a batch; tokens after the prompt are kept."""
    place = position.clamp(0, kept.shape[-1] - 1)[:, None].expand(-1, kept.shape[1], -1)
    inside = (position >= 0) & (position < length[:, None])
    return (kept.gather(2, place) & inside[:, None]) | (position >= length[:, None])[:, None]


def _in_window(window: Int[Tensor, "b g"], position: Int[Tensor, "b k"], n_sink: int) -> Bool[Tensor, "b g k"]:
    """Columns that the next row, and every later one, can see."""
    next_row = (position >= 0).sum(1)[:, None, None]
    place = position[:, None]
    return (place >= 0) & ((place < n_sink) | (place >= next_row - window[..., None]))
