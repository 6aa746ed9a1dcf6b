"""Attention without the rotary embedding: heads matched by content alone, read while the model runs unchanged."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import ModelError, UsageError
from interp.hooks.model.layers import attention_layers, unwrap
from interp.hooks.model.scope import ModuleHook, module_hooks
from interp.hooks.read.capture import Capture
from interp.hooks.read.reductions import Z
from interp.hooks.seam import Connection, Seam, tapping
from interp.hooks.transformerlens.bridge import IdleTap

CACHES = ("past_key_values", "past_key_value", "layer_past")


@contextlib.contextmanager
def without_rope(model: nn.Module) -> Iterator[None]:
    """Make captures inside the context read attention without the rotation of queries and keys.

    A layer that is read runs its attention module twice. The first run uses the identity rotation (cos 1, sin 0), and
    captures read it: queries and keys before RoPE and after any norm, also from fused projections, and every reduction
    of `softmax(scale q . k)` over them, with the masks of the model. The second run is unchanged and not read, so that
    later layers and the logits are those of the model, identical to the bit. A model without RoPE (learned positions)
    is read unchanged.

    The context serves one forward pass without a cache, as `run` and `read` of `interp.hooks.read.capture` make it.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.

    Raises:
        ModelError: If a layer does not receive its rotation as `position_embeddings=(cos, sin)`.
        UsageError: If the model runs with a cache, or a capture reads `keep.z`, which both runs would fill.

    Examples:
        >>> from interp.hooks.read.capture import run
        >>> from interp.hooks.transformerlens.without_rope import without_rope
        >>> with without_rope(model), interp.capture(model, interp.keep.q(), prompts) as cap:
        ...     _ = run(model, prompts)
        >>> cap[interp.keep.q()].shape
        torch.Size([2, 2, 4, 17, 16])
    """
    model = unwrap(model)
    with contextlib.ExitStack() as stack:
        unrotated = UnrotatedPass(stack.enter_context(tapping(model, IdleTap())))
        modules = attention_layers(model).values()
        hooks = [ModuleHook(module, unrotated.before, with_kwargs=True) for module in modules]
        hooks += [ModuleHook(module, unrotated.after, after=True, always_call=True) for module in modules]
        stack.enter_context(module_hooks(hooks))
        yield


@dataclass(eq=False)
class UnrotatedPass:
    """The additional run of each attention module with the identity rotation."""

    seam: Seam
    _running: bool = False
    _paused: list[Connection] = field(default_factory=list)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the module once without rotation for the captures, and hide them from the run that follows."""
        layer: Any = module.layer_idx
        acting = [each for each in self.seam.connections if each.scope.acts_here()]
        captures = [each for each in acting if isinstance(each.tap, Capture)]
        reading: list[Any] = [each.tap for each in captures if each.tap.at(layer)]
        if self._running or not reading:
            return
        if any(type(item) is Z for tap in reading for item in tap.keep):
            raise UsageError("keep.z cannot be read without rotation: capture it in a separate run.")
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        given = {**call.arguments, **call.arguments.get("kwargs", {})}
        if any(given.get(name) is not None for name in CACHES):
            raise UsageError(
                "attention without rotation is read in one forward pass without a cache; pass use_cache=False."
            )
        rotation = given.get("position_embeddings")
        if rotation is None and not _uses_rope(module):
            return
        where = call.arguments if "position_embeddings" in call.arguments else call.arguments.get("kwargs", {})
        where["position_embeddings"] = _identity_rotation(module, rotation)
        self._running = True
        try:
            with torch.no_grad():
                module(*call.args, **call.kwargs)
        finally:
            self._running = False
        # edits stay in place; captures have already read this layer
        self._paused = captures
        for each in self._paused:
            each.paused = True

    def after(self, *_: Any) -> None:
        """Connect the taps that `before` has paused."""
        if not self._running:
            for each in self._paused:
                each.paused = False
            self._paused = []


def _uses_rope(module: nn.Module) -> bool:
    """Whether the config of an attention module names a rotary embedding."""
    config: Any = getattr(module, "config", None)
    return any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta"))


def _identity_rotation(module: nn.Module, rotation: Any) -> tuple[Tensor, Tensor]:
    """The identity rotation in the shape of the given rotation."""
    pair = isinstance(rotation, tuple | list) and len(rotation) == 2
    if not pair or not all(isinstance(part, Tensor) and not part.is_complex() for part in rotation):
        raise ModelError(
            f"{type(module).__name__} does not receive its rotation as position_embeddings=(cos, sin), so its "
            "attention cannot be read without rotation; read it with rotation."
        )
    cos, sin = rotation
    return torch.ones_like(cos), torch.zeros_like(sin)
