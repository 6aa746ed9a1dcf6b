"""Whether a layer is being computed again, for a backward pass that did not store what it computed."""

import contextlib
import threading
from collections.abc import Iterator

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
