"""The one writer of all output files: whole or not at all, on disk before it returns, and only over regular files."""

import contextlib
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from interp.errors import InterpError, ScoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUN_MANIFEST = "manifest.json"
RUN_PARTS = ("cells", "results", "stages")
"""folders of a run whose files only the run writes"""
RUN_FORMAT = b'"interp.run/'
"""what the manifest of a run of any version holds"""
HIDDEN = re.compile(r"\..+\.[0-9a-f]{16,32}\.tmp", re.DOTALL)
"""name of the hidden file that is written before it gets its name"""
MAX_NAME_BYTES = 180
"""longest name that fits into the name of a hidden file"""
KINDS = {
    stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def write_atomic(path: str | Path, data: bytes, error: type[InterpError] = ScoreError, *, in_run: bool = False) -> Path:
    """Write a file so that a reader, or a computer that starts again, sees the old content or all of the new one.

    The data go to a hidden file in the same folder and to the disk; then the hidden file takes the name, and the folder
    goes to the disk. Permissions of a file that is replaced are kept. Hidden files for this name
    that a killed process left behind are removed; one that another process is writing is not.

    Args:
        path: The file.
        data: Its content.
        error: Class of the error that is raised.
        in_run: Whether a run writes a file inside its folder.

    Returns:
        Path: The file.

    Raises:
        InterpError: Of the class `error`, for anything that `check_writable` refuses, and for a full disk and the like.
    """
    path = Path(path)
    mode = check_writable(path, error, in_run=in_run)
    temporary = None
    try:
        sweep(path.parent, _hidden_prefix(path))
        descriptor, temporary = _open_hidden(path)
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            # renamed while the lock is held, so that nobody sweeps it; Windows renames no open file
            if fcntl is not None:
                os.replace(temporary, path)
        if fcntl is None:
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, ValueError) as failed:
        raise error(
            f"{path} cannot be written ({reason(failed)}); give a path in a folder that you may write to."
        ) from failed
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return path


def check_writable(path: str | Path, error: type[InterpError] = ScoreError, *, in_run: bool = False) -> int | None:
    """Refuse a path that `write_atomic` would not write, before anything is computed for it.

    Args:
        path: The file.
        error: Class of the error that is raised.
        in_run: Whether a run writes a file inside its folder.

    Returns:
        Permissions of the file that would be replaced; None where there is none.

    Raises:
        InterpError: Of the class `error`: for a symbolic link, a folder, a device, a named pipe or a socket, for a file
            without permission to write, for a file of a run, and where the folder is missing or cannot be written.
    """
    path = Path(path)
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except (OSError, ValueError) as failed:
        raise error(f"{str(path)!r} cannot be written ({reason(failed)}); give another path.") from failed
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise error(f"{path} cannot be written, since it is a folder; give a file name.")
    if found is not None and not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise error(f"{path} cannot be written, since it is {kind}; give the path of a regular file or a new one.")
    if found is not None and not os.access(path, os.W_OK):
        raise error(f"{path} cannot be written, since it is write-protected; give another path.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise error(
            f"{path} cannot be written, since {path.parent} is not a folder you may write to; give another path."
        )
    if not in_run and (run := _run_of(path)) is not None:
        raise error(f"{path} cannot be written, since it belongs to the run in {run}; give another path.")
    return None if found is None else stat.S_IMODE(found.st_mode)


def make_folder(path: str | Path, error: type[InterpError] = ScoreError) -> Path:
    """Make a folder and those above it where they are missing, and put their names on the disk.

    Args:
        path: The folder.
        error: Class of the error that is raised.

    Returns:
        Path: The folder.

    Raises:
        InterpError: Of the class `error`, if the folder cannot be made.
    """
    path = Path(path)
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _sync_folder(folder.parent)
    except (OSError, ValueError) as failed:
        raise error(f"{path} cannot be made ({reason(failed)}); name a folder that you may write to.") from failed
    return path


def is_run_manifest(path: Path) -> bool:
    """Whether a file is the manifest of a run, of any version."""
    try:
        return path.is_file() and RUN_FORMAT in path.read_bytes()[:4096]
    except (OSError, ValueError):
        return False


def sweep(folder: Path, prefix: str = ".") -> None:
    """Remove the hidden files that killed writers left in a folder, and none that is being written.

    Args:
        folder: The folder.
        prefix: Beginning of the names.
    """
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        names = [entry.name for entry in os.scandir(folder)]
        left = [folder / name for name in names if name.startswith(prefix) and HIDDEN.fullmatch(name)]
        for path in left:
            with _locked(path) as free:
                if free:
                    os.unlink(path)


def reason(error: Exception) -> str:
    """The cause of an error in a few words."""
    return str(getattr(error, "strerror", None) or error)


def _run_of(path: Path) -> Path | None:
    """The folder of the run that a file belongs to, None where it belongs to none."""
    whole = Path(os.path.realpath(path.parent)) / path.name
    for folder in whole.parents:
        # the file systems of some computers know no capitals
        parts = [part.lower() for part in whole.relative_to(folder).parts]
        own = parts == [RUN_MANIFEST] or (len(parts) > 1 and parts[0] in RUN_PARTS)
        if own and is_run_manifest(folder / RUN_MANIFEST):
            return folder
    return None


def _hidden_prefix(path: Path) -> str:
    """The beginning of the hidden names of a file."""
    name = path.name
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}."


def _open_hidden(path: Path) -> tuple[int, Path]:
    """A new hidden file next to a path, open and locked."""
    while True:
        hidden = path.with_name(f"{_hidden_prefix(path)}{uuid.uuid4().hex[:16]}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(hidden, flags, 0o666)
        if fcntl is None:
            return descriptor, hidden
        # file systems without locks have no sweepers either
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # a sweeper may have removed it before the lock was there
        if os.fstat(descriptor).st_nlink:
            return descriptor, hidden
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether no living process writes a hidden file; it stays locked inside of the context."""
    assert fcntl is not None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    if fcntl is None:
        return
    # some network file systems cannot, and a folder may be written that cannot be read
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
