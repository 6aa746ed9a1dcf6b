"""One writer at a time in a run folder, by a lock that ends with the process that holds it."""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from interp.errors import RunError
from interp.hooks.writer import reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
"""an empty file in the folder of a run; the system drops the lock on it when its process ends in any way"""
PATIENCE = 2.0
"""seconds that the start of a run waits for another process to release the lock"""


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder while the context is open.

    Args:
        folder: The folder of a run.

    Raises:
        RunError: If another process, or another thread, holds it, or the lock file cannot be opened.
    """
    if fcntl is None:
        yield from _held_on_windows(folder)
        return
    # a link in its place is not followed
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(folder / LOCK, flags, 0o666)
    except OSError as error:
        raise RunError(f"{folder / LOCK} cannot be opened ({reason(error)}); name another folder.") from error
    try:
        _wait(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, folder: Path) -> None:
    assert fcntl is not None
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise _busy(folder) from error
            time.sleep(0.05)
        except OSError as error:
            # a cluster may mount file systems without locks; the run is right as long as it is alone
            warnings.warn(
                f"the file system of {folder} has no locks ({reason(error)}); let no other process write to this run.",
                stacklevel=4,
            )
            return
        else:
            return


def _held_on_windows(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / LOCK, timeout=PATIENCE):
            yield
    except Timeout as error:
        raise _busy(folder) from error


def _busy(folder: Path) -> RunError:
    return RunError(
        f"another process is writing to the run in {folder}; wait until it has finished, or name another folder."
    )
