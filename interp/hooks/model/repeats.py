"""Whether a layer is being computed again in a backward pass, because the forward pass did not store its results."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from interp.errors import UsageError
from interp.hooks.model.scope import Scope, inheriting, open_scopes, replaced_functions

# a backward pass has one thread for each device
_repeats = threading.local()


@contextlib.contextmanager
def repeating() -> Iterator[None]:
    """Run calls of a layer that were made before, with their edits, and without reading anything a second time."""
    before = is_repeating()
    _repeats.active = True
    try:
        yield
    finally:
        _repeats.active = before


def is_repeating() -> bool:
    """Whether the call that runs was made before."""
    return getattr(_repeats, "active", False)


@contextlib.contextmanager
def marking_repeats(model: nn.Module, scope: Scope) -> Iterator[None]:
    """Recognise layers that the gradient checkpointing of transformers computes again in a backward pass.

    There a context edits again and reads nothing. A backward pass after the context is refused if the context has
    edited, because it would compute the layers without the edits.

    Args:
        model: The model.
        scope: The scope of the context.
    """
    functions = {
        module: partial(_checkpoint, module.__dict__["_gradient_checkpointing_func"], scope)
        for module in model.modules()
        if "_gradient_checkpointing_func" in module.__dict__
    }
    if not functions:
        yield
        return
    with replaced_functions(functions, "_gradient_checkpointing_func", scope):
        yield


def _checkpoint(original: Callable[..., Any], scope: Scope, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    """Call the checkpoint function of transformers, with the calls of the layer after the first one marked."""
    scopes, calls = open_scopes(), []

    def run(*inputs: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            return function(*inputs, **more)
        if scope.edited and not scope.open:
            raise UsageError(
                "the backward pass began after a context that edits the model had closed, and gradient checkpointing "
                "would compute the layers again without the edits; call backward() inside the context."
            )
        with inheriting(scopes), repeating():
            return function(*inputs, **more)

    return original(run, *args, **kw)
