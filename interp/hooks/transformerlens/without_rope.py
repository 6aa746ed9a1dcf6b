"""Attention without its rotary embedding: what heads match by content alone, read while the model runs as it is."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import ModelError, UsageError
from interp.hooks.model.layers import attention_layers, plain
from interp.hooks.read.capture import Capture
from interp.hooks.read.reductions import Z
from interp.hooks.seam import AttentionTap, Seam, tapping
from interp.hooks.transformerlens.bridge import Nothing

CACHES = ("past_key_values", "past_key_value", "layer_past")


@contextlib.contextmanager
def unrotated(model: nn.Module) -> Iterator[None]:
    """Let captures opened inside read attention with the rotation of queries and keys left out.

        with unrotated(model), interp.capture(model, [keep.q(), keep.k()], prompts) as cap:
            run(model, prompts)

    A layer that is read runs its attention module twice. First with a rotation by nothing (cos 1, sin 0), which is
    what captures see: queries and keys before RoPE and after any norm, of fused projections too, and every reduction
    of softmax(scale q . k) over them, with the masks of the model. Then as it is, unread, so that later layers and
    logits are the model's own, to the bit. A model without RoPE (learned positions) is read as it is.
    For one forward without a cache, as `run` and `read` make it. Raises ModelError for a layer that rotates in a way
    not known here, UsageError for a cache, and for keep.z, which both runs would fill.
    """
    model = plain(model)
    with contextlib.ExitStack() as stack:
        twice = Twice(stack.enter_context(tapping(model, Nothing())))
        for module in attention_layers(model).values():
            stack.callback(module.register_forward_pre_hook(twice.before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(twice.after, always_call=True).remove)
        yield


@dataclass(eq=False)
class Twice:
    """The two runs of each attention module."""

    seam: Seam
    _again: bool = False
    _held: list[AttentionTap] | None = field(default=None)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer: Any = module.layer_idx
        reading = [tap for tap in self.seam.taps if isinstance(tap, Capture) and tap.at(layer)]
        if self._again or not reading:
            return
        if any(type(item) is Z for tap in reading for item in tap.keep):
            raise UsageError("keep.z cannot be read without rotation: capture it in a run of its own.")
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        given = {**call.arguments, **call.arguments.get("kwargs", {})}
        if any(given.get(name) is not None for name in CACHES):
            raise UsageError("attention without rotation is read in one forward without a cache: pass use_cache=False.")
        rotation = given.get("position_embeddings")
        if rotation is None and not _rotary(module):
            return
        where = call.arguments if "position_embeddings" in call.arguments else call.arguments.get("kwargs", {})
        where["position_embeddings"] = _none(module, rotation)
        self._again = True
        try:
            with torch.no_grad():
                module(*call.args, **call.kwargs)
        finally:
            self._again = False
        # edits stay: only what reads has seen this layer already
        self._held = self.seam.taps
        self.seam.taps = [tap for tap in self._held if not isinstance(tap, Capture)]

    def after(self, *_: Any) -> None:
        if not self._again and self._held is not None:
            self.seam.taps, self._held = self._held, None


def _rotary(module: nn.Module) -> bool:
    config: Any = getattr(module, "config", None)
    return any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta"))


def _none(module: nn.Module, rotation: Any) -> tuple[Tensor, Tensor]:
    """The rotation by nothing, in the shape of the given one."""
    pair = isinstance(rotation, tuple | list) and len(rotation) == 2
    if not pair or not all(isinstance(part, Tensor) and not part.is_complex() for part in rotation):
        raise ModelError(
            f"{type(module).__name__} is not handed its rotation as position_embeddings=(cos, sin), so it cannot be "
            "read without: use the attention as it is."
        )
    cos, sin = rotation
    return torch.ones_like(cos), torch.zeros_like(sin)
