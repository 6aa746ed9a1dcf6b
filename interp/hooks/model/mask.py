"""The attention mask of a model as a small description; the mask itself is built only where it is needed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import ModelError


@dataclass(eq=False)
class MaskFacts:
    """The arguments of a model's mask function, and the facts that follow from them."""

    implementation: str | None
    """The attention implementation of the model, without interp."""
    arguments: dict[str, Any]
    """The keyword arguments that transformers passes to a mask function."""

    @cached_property
    def mask(self) -> Tensor | None:
        """The mask that the original attention function of the model receives."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as makers

        return makers[self.implementation](**self.arguments) if self.implementation in makers else None

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

    @cached_property
    def first(self) -> Tensor:
        """Int `[b]` column of the first real token."""
        if self.padding is None:
            return torch.zeros(self.arguments["batch_size"], dtype=torch.int64, device=self.arguments.get("device"))
        return self.padding.to(torch.int8).argmax(1)

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

    It has the shape of the mask, occupies one element of memory, and carries the facts.
    """

    facts: MaskFacts

    @classmethod
    def of(cls, facts: MaskFacts) -> "DeferredMask":
        """Make the placeholder of the mask that the facts describe."""
        arguments = facts.arguments
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        made = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=arguments.get("device")).expand(shape).as_subclass(cls)
        made.facts = facts
        return made

    def facts_for(self, module: nn.Module) -> MaskFacts:
        """Return the facts of the mask that arrived at an attention module.

        Args:
            module: The attention module, for the message.

        Returns:
            The facts.

        Raises:
            ModelError: If the model computed something from the mask on the way, so that the facts are lost.
        """
        if not hasattr(self, "facts"):
            raise ModelError(
                f"{type(module).__name__} receives an attention mask that the model has changed, so interp cannot tell "
                "padding from text; use a model that passes its mask to the layers unchanged."
            )
        return self.facts

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source = args[0] if args else None
        if func is Tensor.contiguous and isinstance(source, DeferredMask):
            # generate() calls it on the mask of a static cache, which would fill q x k elements
            return source
        result = super().__torch_function__(func, types, args, kwargs or {})
        # a copy to another device represents the same mask; a slice or a sum does not
        if (
            func is Tensor.to
            and isinstance(source, DeferredMask)
            and isinstance(result, DeferredMask)
            and hasattr(source, "facts")
        ):
            result.facts = source.facts
        return result


def sees_last_key(mask: Tensor, keys: int) -> bool:
    """Whether any query can attend to the last key."""
    last = mask[..., keys - 1]
    return bool((last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min).any())
