"""The attention mask of a model as a small description; the mask itself is built only where it is needed."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from interp.errors import ModelError
from interp.hooks.model.row_text import RowText

DESCRIBING = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "element_size", "get_device",
    "data_ptr", "is_floating_point", "is_complex", "is_signed", "storage_offset", "is_inference", "__len__", "__hash__",
    "as_subclass",
}  # fmt: skip
"""functions that return what is known of a tensor without its values"""
IN_PLACE = ("__iadd__", "__iand__", "__ior__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
            "__ipow__", "__ixor__", "__ilshift__", "__irshift__")  # fmt: skip
"""operators that change their first operand"""


@dataclass(eq=False)
class MaskFacts:
    """The arguments of a model's mask function, and the facts that follow from them."""

    implementation: str | None
    """The attention implementation of the model, without interp."""
    arguments: dict[str, Any]
    """The keyword arguments that transformers passes to a mask function."""
    _texts: dict[torch.device, RowText] = field(default_factory=dict)

    @cached_property
    def mask(self) -> Tensor | None:
        """The mask that the original attention function of the model receives."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as makers

        return makers[self.implementation](**self.arguments) if self.implementation in makers else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the mask: a number that is added to the logits in eager attention, truth values elsewhere."""
        added = self.implementation in (None, "eager")
        return self.arguments.get("dtype", torch.float32) if added else torch.bool

    def whole(self, device: torch.device) -> Tensor:
        """The mask for a model that computes with it, which is never left out.

        Args:
            device: Device of the mask.

        Raises:
            ModelError: If the attention implementation of the model has masks of another kind.
        """
        from transformers.masking_utils import eager_mask, sdpa_mask

        makers = {None: eager_mask, "eager": eager_mask, "sdpa": sdpa_mask}
        if self.implementation not in makers:
            raise ModelError(
                f"a layer computes with its attention mask, which interp cannot make for {self.implementation!r}; load "
                "the model with attn_implementation='sdpa'."
            )
        always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        found = makers[self.implementation](**{**self.arguments, **always})
        return found.to(device)

    @cached_property
    def start(self) -> tuple[int, int, int]:
        """The column of the first query, the column of the first key, and the number of live keys."""
        q_start, k_start = int(self.arguments.get("q_offset", 0)), int(self.arguments.get("kv_offset", 0))
        return q_start, k_start, min(q_start + self.arguments["q_length"] - k_start, self.arguments["kv_length"])

    @cached_property
    def padding(self) -> Tensor | None:
        """Bool `[b n]` over all columns so far, True at real tokens; None where nothing is padded."""
        mask = self.arguments.get("attention_mask")
        return None if mask is None or bool(mask.all()) else mask.bool()

    def text(self, ends: Tensor | None, device: torch.device) -> RowText:
        """The text of each row of the batch, which all layers with this mask share.

        Args:
            ends: Int `[b]`, the column at which the text of each row ends; None where no row has ended.
            device: Device of the positions.

        Raises:
            ModelError: If the mask has fewer columns than the batch and its cache.
        """
        found = self._texts.get(device)
        if found is None:
            n = self.start[0] + self.arguments["q_length"]
            mask = self.arguments.get("attention_mask")
            if mask is not None and mask.shape[-1] < n:
                raise ModelError(
                    f"the attention_mask has {mask.shape[-1]} columns, but the batch and its cache have {n}; give one "
                    "column for each token of the cache and of the batch."
                )
            batch = self.arguments["batch_size"]
            padding = self.padding
            if padding is None:
                found = RowText.unpadded(batch, n, device)
            else:
                found = RowText.of(padding[:, :n].to(device).expand(batch, -1))
            self._texts[device] = found = found if ends is None else found.until(ends)
        return found

    @cached_property
    def structure(self) -> tuple[int | None, bool]:
        """The size of the sliding window, and whether causality, window and padding describe the mask completely."""
        from transformers import masking_utils as masks

        parts = [self.arguments.get("mask_function", masks.causal_mask_function)]
        if parts[0].__code__ is masks.and_masks(masks.causal_mask_function).__code__:
            parts = list(parts[0].__closure__[0].cell_contents)
        window, causal = None, False
        overlay = masks.sliding_window_overlay(1)
        for part in parts:
            if part is masks.causal_mask_function:
                causal = True
            elif part.__code__ is overlay.__code__ and window is None:
                window = int(part.__closure__[0].cell_contents)
            else:
                return None, False
        return window, causal

    @cached_property
    def dense(self) -> Tensor | None:
        """Bool `[b 1 q k]`: the whole mask where `structure` does not describe it; None otherwise.

        Packed sequences, chunked attention and masks that a model defines itself need it.
        """
        from transformers.masking_utils import sdpa_mask

        arguments = dict(self.arguments, allow_is_causal_skip=False)
        return None if self.structure[1] else sdpa_mask(**arguments)


class DeferredMask(Tensor):
    """A placeholder that travels from the model to its layers in place of the mask.

    It has the shape and dtype of the mask, occupies one element of memory, and carries the facts. A model that computes
    with it computes with the mask itself, and gets a `ComputedMask`.
    """

    facts: MaskFacts

    @classmethod
    def of(cls, facts: MaskFacts) -> "DeferredMask":
        """Make the placeholder of the mask that the facts describe."""
        arguments = facts.arguments
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        number = torch.zeros(1, 1, 1, 1, dtype=facts.dtype, device=arguments.get("device"))
        made = number.expand(shape).as_subclass(cls)
        made.facts = facts
        return made

    def facts_for(self, module: nn.Module) -> MaskFacts:
        """Return the facts of the mask that arrived at an attention module.

        Args:
            module: The attention module, for the message.

        Returns:
            The facts.

        Raises:
            ModelError: If the mask came to the module without its facts, as through a copy.
        """
        if not hasattr(self, "facts"):
            raise ModelError(
                f"{type(module).__name__} receives a copy of the attention mask, so interp cannot tell padding from "
                "text; use a model that passes its mask to the layers unchanged."
            )
        return self.facts

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else None
        if isinstance(source, DeferredMask) and hasattr(source, "facts"):
            # generate() calls `contiguous` on the mask of a static cache, which would fill q x k elements
            if func is Tensor.contiguous:
                return source
            # a copy to another device represents the same mask; a slice or a sum does not
            if func is Tensor.to:
                result: Any = super().__torch_function__(func, types, args, kwargs)
                if result.dtype == source.dtype:
                    result.facts = source.facts
                    return result
        if _describes(func):
            return super().__torch_function__(func, types, args, kwargs)
        name = func.__name__
        changes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE
        if isinstance(kwargs.get("out"), DeferredMask) or (changes and isinstance(source, DeferredMask)):
            raise ModelError(
                f"a layer changes its attention mask in place ({name}), which the layers share, and interp has only a "
                "placeholder there; use a model that makes a new mask."
            )
        found = [each for each in tree_leaves((args, kwargs)) if isinstance(each, DeferredMask)]
        if not all(hasattr(each, "facts") for each in found):
            return super().__torch_function__(func, types, args, kwargs)
        facts = found[0].facts
        args, kwargs = tree_map(lambda x: x.facts.whole(x.device) if isinstance(x, DeferredMask) else x, (args, kwargs))
        return _with_facts(func(*args, **kwargs), facts)


class ComputedMask(Tensor):
    """A mask that a model made from the mask of its text, such as a slice or a sum; it carries the facts."""

    facts: MaskFacts

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, ComputedMask)]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        facts = next((each.facts for each in given if hasattr(each, "facts")), None)
        if isinstance(result, ComputedMask) and hasattr(result, "facts"):
            return result
        return result if facts is None or _describes(func) else _with_facts(result, facts)

    @property
    def plain(self) -> Tensor:
        """The same numbers as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)


def _describes(func: Any) -> bool:
    """Whether a function returns what is known of a tensor without its values, such as its shape."""
    name = func.__name__
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in ("data", "T", "mT", "H", "mH", "real", "imag")
    return name in DESCRIBING


def _with_facts(result: Any, facts: MaskFacts) -> Any:
    """A result with the facts, where it has the shape of a mask of the same queries and keys."""
    arguments = facts.arguments
    if type(result) not in (Tensor, ComputedMask) or result.dim() < 4:
        return result
    if result.shape[-2] != arguments["q_length"] or result.shape[-1] > arguments["kv_length"]:
        return result.as_subclass(Tensor) if isinstance(result, ComputedMask) else result
    made = result.as_subclass(ComputedMask)
    made.facts = facts
    return made
