"""A KV cache that evicts keys: it stores only the keys that each kv head keeps."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from interp.errors import UsageError
from interp.hooks.model.layers import unwrap


@dataclass(eq=False)
class Hiding:
    """A context that hides evicted keys from attention. Copies of a cache share it, so it ends for them too."""

    active: bool = True

    def __deepcopy__(self, memo: Any) -> "Hiding":
        return self


class EvictingLayer(DynamicLayer):
    """One layer of an `EvictingCache`.

    It stores all keys during the prefill. After `evict` it stores the kept keys of all kv heads packed in one row, and
    the later keys. For the time of one attention call it unpacks keys and values to `[b g k d]`, with zeros in place of
    evicted ones. Attention must not see these zeros, so a layer that has evicted keys refuses calls outside of the
    context that hides them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: Bool[Tensor, "b g k"] | None = None
        """The keys that are stored, over the columns at the last `evict`; None while all are stored."""
        self.hiding: Hiding | None = None
        """The context that hides the evicted keys."""
        self._packed: tuple[Tensor, Tensor] | None = None

    @property
    def has_evicted(self) -> bool:
        """Whether a key of some prompt is missing."""
        return self.kept is not None and not bool(self.kept.all())

    def evict(self, kept: Bool[Tensor, "b g k"]) -> None:
        """Evict the keys that are not kept; columns after the last one of `kept` stay.

        Args:
            kept: Bool `[b g k]`, the keys to keep. Keys that were evicted before stay evicted.

        Raises:
            UsageError: If there are fewer columns than `kept` has, or if `kept` has fewer than a call before.
        """
        keys, values = self.keys, self.values
        before = 0 if self.kept is None else self.kept.shape[-1]
        if keys is None or values is None or not before <= kept.shape[-1] <= self.get_seq_length():
            raise UsageError(
                f"evict() was given {kept.shape[-1]} columns of a cache of {self.get_seq_length()} keys: "
                f"give at least the {before} of the call before, and no more than there are."
            )
        kept = kept.to(keys.device)
        if self.kept is not None:
            keys, values = self._unpack(keys, values)
            kept = torch.cat([kept[..., :before] & self.kept, kept[..., before:]], -1)
        n = kept.shape[-1]
        # indexing by a mask copies, and the clone releases the storage of all keys
        self._packed = keys[:, :, :n][kept], values[:, :, :n][kept]
        self.keys, self.values = keys[:, :, n:].clone(), values[:, :, n:].clone()
        self.kept = kept

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.has_evicted and not (self.hiding is not None and self.hiding.active):
            raise UsageError(
                "this EvictingCache has evicted keys, and the context that hides them is closed, so attention would "
                "read zeros in their place; go on inside of selecting(), with its cache= and noted=, or reset() it."
            )
        return self._unpack(*super().update(key_states, value_states, *args, **kwargs))

    def _unpack(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Prepend the kept keys and values, each at its column, to later ones."""
        if self.kept is None or self._packed is None:
            return keys, values
        packed_keys, packed_values = self._packed
        return _scatter(packed_keys, self.kept, keys), _scatter(packed_values, self.kept, values)

    def get_seq_length(self) -> int:
        return super().get_seq_length() + (0 if self.kept is None else self.kept.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of storage of the layer."""
        tensors = [self.keys, self.values, *(self._packed or ())]
        tensors += [] if self.kept is None else [self.kept]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x is not None}
        return sum(storages.values())

    def reset(self) -> None:
        super().reset()
        self.kept = self._packed = self.hiding = None

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise UsageError("an EvictingCache cannot be cropped, nor its rows reordered by beams: use another cache.")

    batch_repeat_interleave = batch_select_indices = reorder_cache = crop


def _scatter(packed: Tensor, kept: Tensor, later: Tensor) -> Tensor:
    """Scatter packed rows to the columns that were kept, and append later ones: [b g k d]."""
    whole = packed.new_zeros(*kept.shape, packed.shape[-1])
    whole[kept] = packed
    return torch.cat([whole, later], 2)


class EvictingCache(DynamicCache):
    """A KV cache for generate(past_key_values=...) whose layers evict keys one by one.

    Layers with a sliding window drop keys by themselves and are left as they are.

    Args:
        model: The model that will use the cache.

    Raises:
        UsageError: If every layer of the model has a sliding window.

    Examples:
        >>> from interp.hooks.edit.evicting_cache import EvictingCache
        >>> cache = EvictingCache(model)
        >>> with torch.no_grad():
        ...     out = model(**prompts.tensors(), past_key_values=cache)
        >>> before = cache.nbytes
        >>> cache.layers[0].evict(torch.arange(17).expand(2, 2, 17) % 2 == 0)
        >>> cache.nbytes < before, cache.get_seq_length()
        (True, 17)
    """

    def __init__(self, model: nn.Module) -> None:
        network: Any = unwrap(model)
        DynamicCache.__init__(self, config=network.config)
        sliding = [bool(getattr(layer, "is_sliding", False)) for layer in self.layers]
        if sliding and all(sliding):
            raise UsageError(
                "every layer of this model has a sliding window, which drops keys by itself; use an ordinary cache."
            )
        # a layer with a sliding window drops keys by itself
        self.layers = [old if slides else EvictingLayer() for old, slides in zip(self.layers, sliding, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of storage of all layers."""
        return sum(nbytes(layer) for layer in self.layers)


def nbytes(cache: Cache | Any) -> int:
    """Count the bytes of storage of a cache.

    Args:
        cache: Any cache of transformers, or one layer of it.

    Returns:
        int: Bytes of the storage of its keys and values.
    """
    if isinstance(cache, Cache):
        return sum(nbytes(layer) for layer in cache.layers)
    if isinstance(cache, EvictingLayer):
        return cache.nbytes
    tensors = [x for x in (cache.keys, cache.values) if isinstance(x, Tensor)]
    return sum(x.untyped_storage().nbytes() for x in tensors)
