"""The edits that are open on each model, so that one of them does not act twice by mistake."""

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from weakref import WeakKeyDictionary

from torch import nn

from interp.errors import UsageError

_open: WeakKeyDictionary[nn.Module, list[Hashable]] = WeakKeyDictionary()


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
    edits = list(edits)
    for edit in edits:
        if any(_equal(edit, other) for other in _open.get(model, ())):
            shown = edit[0] if isinstance(edit, tuple) else edit
            raise UsageError(
                f"{shown if isinstance(shown, str) else repr(shown)} is already open on this model, where a second "
                f"context would apply it twice; close the first context, or {remedy}."
            )
    _open[model] = [*_open.get(model, ()), *edits]
    try:
        yield
    finally:
        _open[model] = [other for other in _open[model] if all(other is not edit for edit in edits)]


def _equal(one: Hashable, other: Hashable) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):
        # two tensors of several numbers have no truth value
        return False
