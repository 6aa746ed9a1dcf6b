"""A KV cache that stores only the keys that are still looked at: as many as each kv head kept."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from interp.errors import UsageError
from interp.hooks.model.layers import unwrap


class EvictingLayer(DynamicLayer):
    """One layer: whole while the prompt is read, then the kept keys of each kv head in one row, and the later keys.

    Attention gets keys and values [b g k d] in their places, zeros where one was dropped: for the time of one call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: Bool[Tensor, "b g k"] | None = None
        """over the columns at the last `evict`; None while all are there"""
        self._packed: tuple[Tensor, Tensor] | None = None

    def evict(self, kept: Bool[Tensor, "b g k"]) -> None:
        """Drop the columns that are not kept, or were not before; those past the last axis of `kept` stay.

        Raises UsageError where more columns are named than there are, or fewer than were dropped from before.
        """
        keys, values = self.keys, self.values
        before = 0 if self.kept is None else self.kept.shape[-1]
        if keys is None or values is None or not before <= kept.shape[-1] <= self.get_seq_length():
            raise UsageError(
                f"a cache of {self.get_seq_length()} keys, {before} of them compact, cannot keep some of the first "
                f"{kept.shape[-1]}: name at least the compact ones, and no more than there are."
            )
        kept = kept.to(keys.device)
        if self.kept is not None:
            keys, values = self._whole(keys, values)
            kept = torch.cat([kept[..., :before] & self.kept, kept[..., before:]], -1)
        n = kept.shape[-1]
        # indexing by a mask copies, and the clone lets go of the whole
        self._packed = keys[:, :, :n][kept], values[:, :, :n][kept]
        self.keys, self.values = keys[:, :, n:].clone(), values[:, :, n:].clone()
        self.kept = kept

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._whole(*super().update(key_states, value_states, *args, **kwargs))

    def _whole(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values after the kept ones, each in its place."""
        if self.kept is None or self._packed is None:
            return keys, values
        first, second = self._packed
        return _placed(first, self.kept, keys), _placed(second, self.kept, values)

    def get_seq_length(self) -> int:
        return super().get_seq_length() + (0 if self.kept is None else self.kept.shape[-1])

    @property
    def nbytes(self) -> int:
        """What the layer holds, in bytes of storage."""
        held = [self.keys, self.values, *(self._packed or ())]
        held += [] if self.kept is None else [self.kept]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held if x is not None}
        return sum(storages.values())

    def reset(self) -> None:
        super().reset()
        self.kept = self._packed = None

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise UsageError("a compact cache cannot be cropped, or its rows reordered as beams are: use another cache.")

    batch_repeat_interleave = batch_select_indices = reorder_cache = crop


def _placed(packed: Tensor, kept: Tensor, later: Tensor) -> Tensor:
    """[b g k d] with the packed rows where they were kept."""
    whole = packed.new_zeros(*kept.shape, packed.shape[-1])
    whole[kept] = packed
    return torch.cat([whole, later], 2)


class EvictingCache(DynamicCache):
    """A cache for generate(past_key_values=...), whose layers can be compacted one by one."""

    def __init__(self, model: nn.Module) -> None:
        network: Any = unwrap(model)
        DynamicCache.__init__(self, config=network.config)
        sliding = [bool(getattr(layer, "is_sliding", False)) for layer in self.layers]
        # a sliding layer drops its keys by itself
        self.layers = [old if slides else EvictingLayer() for old, slides in zip(self.layers, sliding, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of storage of all layers."""
        return sum(nbytes(layer) for layer in self.layers)


def nbytes(cache: Cache | Any) -> int:
    """Bytes of storage that a cache, or one layer of it, holds."""
    if isinstance(cache, Cache):
        return sum(nbytes(layer) for layer in cache.layers)
    if isinstance(cache, EvictingLayer):
        return cache.nbytes
    held = [x for x in (cache.keys, cache.values) if isinstance(x, Tensor)]
    return sum(x.untyped_storage().nbytes() for x in held)
