"""Inputs and outputs of a model's own eager attention by layer, for formulas that do not use the code under test."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from interp.hooks.prompts.prompts import Prompt


@dataclass(frozen=True, eq=False)
class Calls:
    """Attention of one unpadded prompt. Keys and values are repeated for each query head."""

    q: Tensor
    """[l h q d], after RoPE."""
    k: Tensor
    """[l h k d], after RoPE."""
    v: Tensor
    """[l h k d]."""
    z: Tensor
    """[l h q d], the outputs of the heads."""
    pattern: Tensor
    """[l h q k]."""
    scale: float
    """Factor of q . k."""


def calls(model: Any, prompt: Prompt) -> Calls:
    """Run one forward pass and return its attention."""
    found: list[tuple[Tensor, ...]] = []
    scales = set()

    def note(own: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **settings: Any) -> Any:
        out, pattern = own(module, q, k, v, mask, **settings)
        each = q.shape[1] // k.shape[1]
        wide = (x.repeat_interleave(each, 1) for x in (k, v))
        found.append((q, *wide, out.transpose(1, 2), pattern))
        scales.add(settings.get("scaling") or q.shape[-1] ** -0.5)
        return out, pattern

    with torch.no_grad(), attending(model, note):
        model(torch.tensor([prompt.ids]), use_cache=False)
    (scale,) = scales
    return Calls(*(torch.cat(layers) for layers in zip(*found, strict=True)), scale=scale)


@contextlib.contextmanager
def attending(model: Any, attention: Callable[..., Any]) -> Iterator[None]:
    """Replace eager attention by `attention(own, module, q, k, v, mask, **settings)`; own is the model's function.

    It receives q [b h q d], k and v [b g k d], and returns (z [b q h d], pattern [b h q k]). `module.layer_idx` is the
    layer.
    """
    home: Any = sys.modules[type(model).__module__]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with mock.patch.object(home, "eager_attention_forward", partial(attention, home.eager_attention_forward)):
            yield
    finally:
        model.set_attn_implementation(before)
