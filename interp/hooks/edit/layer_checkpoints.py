"""Backward passes that compute each decoder layer again, so that only the inputs of the layers are stored."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interp.errors import UsageError
from interp.hooks.edit.partial_forward import decoder_layers
from interp.hooks.model.layers import unwrap
from interp.hooks.model.repeats import repeating
from interp.hooks.model.scope import ModuleHook, inheriting, module_hooks, open_scopes, replaced_functions


@contextlib.contextmanager
def layer_checkpoints(model: nn.Module) -> Iterator["LayerCheckpoints"]:
    """Store the input of each decoder layer alone in forward passes with gradients, and compute the layer again.

    A backward pass through a model needs everything that its layers computed, which is about 20 times the residual
    stream. Here it needs the inputs of the layers, and what one layer computed at a time. Gradients are equal to the
    bit where the model computes the same numbers twice; dropout is repeated with the same random numbers.

    The hooks and edits of a layer act once in the forward pass and once more in the backward pass, so that contexts
    that edit the model have to be open until the backward pass is over. A `capture` reads the first of both alone.
    `transformers` has checkpoints too
    (`activation_checkpointing_enable`), but these act in training mode alone, where dropout acts as well.

    A forward pass with a cache of keys is left as it is, since its layers would write into the cache twice; so is a
    pass without gradients.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.

    Yields:
        LayerCheckpoints: The call of a layer that is running, for hooks that store something themselves.

    Raises:
        ModelError: If the model does not keep its layers in a list.
        UsageError: If a backward pass begins after the context has closed.

    Examples:
        >>> from interp.hooks.edit.layer_checkpoints import layer_checkpoints
        >>> inputs = prompts.tensors()
        >>> with layer_checkpoints(model):
        ...     model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()

    Limits:
        Costs one more forward pass. What is computed outside of the layers, such as logits, is stored as before.
    """
    checkpoints = LayerCheckpoints()
    blocks = decoder_layers(unwrap(model)).values()
    try:
        with replaced_functions({block: checkpoints.wrap(block, block.forward) for block in blocks}):
            yield checkpoints
    finally:
        checkpoints.open = False


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Run the forward passes of a model without a cache of keys, for callers that cannot give `use_cache=False`."""

    def drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "use_cache": False}

    with module_hooks([ModuleHook(unwrap(model), drop, with_kwargs=True)]):
        yield


@dataclass(eq=False)
class LayerCall:
    """One call of a layer whose internals are computed again in the backward pass."""

    recomputed: dict[str, Tensor] = field(default_factory=dict)
    """tensors that hooks store while the layer is computed again, for hooks of the backward pass"""


@dataclass(eq=False)
class LayerCheckpoints:
    """The state of `layer_checkpoints`."""

    open: bool = True
    """whether the context is open"""
    # a backward pass has one thread for each device
    _thread: threading.local = field(default_factory=threading.local)

    @property
    def call(self) -> LayerCall | None:
        """The call of a layer that is running; None outside of one, and in a call that stores everything."""
        return getattr(self._thread, "call", None)

    def wrap(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a decoder layer with its internals computed again in the backward pass."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or _has_cache(args, kwargs):
                return forward(*args, **kwargs)
            dropout = any(module.training for module in block.modules())
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=dropout, context_fn=self._contexts, **kwargs
            )

        return run

    def _contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        # a backward pass on a GPU has a thread of its own
        call, scopes = LayerCall(), open_scopes()
        return self._running(call), Reopened(lambda: self._repeating(call, scopes))

    @contextlib.contextmanager
    def _running(self, call: LayerCall) -> Iterator[None]:
        outer, self._thread.call = self.call, call
        try:
            yield
        finally:
            self._thread.call = outer

    @contextlib.contextmanager
    def _repeating(self, call: LayerCall, scopes: frozenset[int]) -> Iterator[None]:
        if not self.open:
            raise UsageError(
                "the backward pass began after layer_checkpoints had closed, where the layers cannot be computed again "
                "with the hooks of the forward pass; call backward() inside the context."
            )
        with self._running(call), inheriting(scopes), repeating():
            yield


@dataclass(eq=False)
class Reopened(contextlib.AbstractContextManager[None]):
    """A context that is made anew each time it is entered, since a graph may have several backward passes."""

    make: Callable[[], contextlib.AbstractContextManager[None]]
    _inside: list[contextlib.AbstractContextManager[None]] = field(default_factory=list)

    def __enter__(self) -> None:
        context = self.make()
        context.__enter__()
        self._inside.append(context)

    def __exit__(self, *error: Any) -> None:
        self._inside.pop().__exit__(*error)


def _has_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    from transformers.cache_utils import Cache

    return any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
