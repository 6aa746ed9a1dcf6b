"""The edits that are open on each model, so that one of them does not act twice by mistake."""

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from weakref import WeakKeyDictionary

from torch import nn

from interp.errors import UsageError
from interp.hooks.model.scope import Scope, held

_open: WeakKeyDictionary[nn.Module, tuple[tuple[Scope, Hashable], ...]] = WeakKeyDictionary()


@contextlib.contextmanager
def opened_once(model: nn.Module, edits: Iterable[Hashable], remedy: str) -> Iterator[None]:
    """Refuse edits that are open on a model already, as when a cell of a notebook runs twice.

    Args:
        model: The model.
        edits: The edits, or tuples of an edit and what else makes it the same; equal ones are the same edit.
        remedy: How to apply one of them twice on purpose, for the message.

    Yields:
        None: The edits are open until the context closes.

    Raises:
        UsageError: If an equal edit is open on the model.
    """
    edits, scope = list(edits), Scope()

    def enter() -> None:
        before = _open.get(model, ())
        for edit in edits:
            # an equal edit of another thread acts on the calls of that thread
            if any(other_scope.acts_here() and _equal(edit, other) for other_scope, other in before):
                shown = edit[0] if isinstance(edit, tuple) else edit
                raise UsageError(
                    f"{shown if isinstance(shown, str) else repr(shown)} is already open on this model, where a second "
                    f"context would apply it twice; close the first context, or {remedy}."
                )
        _open[model] = (*before, *((scope, edit) for edit in edits))

    def leave() -> None:
        _open[model] = tuple(pair for pair in _open.get(model, ()) if pair[0] is not scope)

    with held(enter, leave, scope):
        yield


def _equal(one: Hashable, other: Hashable) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):
        # two tensors of several numbers have no truth value
        return False
