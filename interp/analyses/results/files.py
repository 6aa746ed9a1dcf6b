"""Files of results: their text and JSON, and finished pieces of long computations that are kept in a folder."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.errors import ScoreError
from interp.hooks import limits
from interp.hooks.limits import check_regular, parse_json
from interp.hooks.writer import make_folder, write_atomic

SEAL = "sha256"
"""entry of a JSON object that holds the checksum of the others"""


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        ScoreError: If the file cannot be read.
    """
    return limits.read_text(path, ScoreError)


def plain(value: Any, what: str) -> Any:
    """A value as JSON returns it, with lists in place of tuples.

    Args:
        value: Numbers, texts, lists and dicts.
        what: Name of the value in the error.

    Raises:
        ScoreError: If JSON cannot hold the value.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ScoreError(f"{what} cannot be written as JSON ({error}); use numbers, texts, lists and dicts.") from error


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of all its other entries, so that a change is found when it is read.

    Args:
        content: The object.

    Returns:
        The object with the entry "sha256". It protects against damage and mistakes, and against nobody who means it.

    Examples:
        >>> from interp.analyses.results.files import is_sealed, seal
        >>> stored = seal({"seed": 0})
        >>> is_sealed(stored), is_sealed(stored | {"seed": 1})
        (True, False)
    """
    return {**content, SEAL: _checksum(content)}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether an object is as `seal` returned it."""
    return content.get(SEAL) == _checksum(content)


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def pack(tensors: Mapping[str, Tensor], name: str) -> bytes:
    """Tensors as a safetensors file that holds a checksum of them and of its name.

    Args:
        tensors: The tensors.
        name: Name of the file.
    """
    from safetensors.torch import save as serialise

    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    return serialise(whole, {SEAL: _checksum_of(serialise(whole), name)})


def unpack(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `pack` made.

    Args:
        path: The file.

    Raises:
        ScoreError: If the file cannot be read, or is damaged or renamed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise
    from safetensors.torch import save as serialise

    check_regular(path, ScoreError, None)
    try:
        data = path.read_bytes()
        tensors = deserialise(data)
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, OSError, ValueError) as error:
        raise ScoreError(f"{path} is broken ({error}); delete it and run again.") from None
    if header.get("__metadata__", {}).get(SEAL) != _checksum_of(serialise(tensors), path.name):
        raise ScoreError(f"{path} is broken (its checksum differs); delete it and run again.")
    return tensors


def _checksum_of(data: bytes, name: str) -> str:
    return hashlib.sha256(name.encode() + b"\0" + data).hexdigest()


def joined(tensors: Sequence[Tensor], name: str) -> Tensor:
    """Concatenate tensors along the first axis; shorter later axes are padded with NaN, -1 or False.

    Raises:
        ScoreError: If the tensors differ in their number of axes.
    """
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise ScoreError(f"{name!r} has a different number of axes in each part; join parts of one analysis.")
    widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        fill = torch.nan if tensor.is_floating_point() else False if tensor.dtype == torch.bool else -1
        full = tensor.new_full((len(tensor), *widest), fill)
        full[tuple(slice(size) for size in tensor.shape)] = tensor
        padded.append(full)
    return torch.cat(padded)


@dataclass(frozen=True)
class Parts:
    """Finished pieces of a long computation, one file each, so that an interrupted run continues after the last one."""

    folder: Path | None
    """None: nothing is kept"""
    name: str
    key: str
    """hash of everything that all pieces of one computation depend on"""

    @classmethod
    def of(cls, folder: str | Path | None, name: str, inputs: Any) -> "Parts":
        """Make the folder where it is missing.

        Args:
            folder: Where the pieces are kept; None to keep nothing.
            name: Beginning of the file names.
            inputs: Everything that the numbers depend on, as JSON can hold it.

        Raises:
            ScoreError: If the folder cannot be made.
        """
        if folder is not None:
            make_folder(folder)
        return cls(None if folder is None else Path(folder), name, digest(inputs))

    def get(self, piece: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of one piece, read from its file where there is one, otherwise made and kept.

        Args:
            piece: What tells the piece from the others, as JSON can hold it.
            make: Function that computes the tensors.

        Raises:
            ScoreError: If the file is broken or cannot be written.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{self.name}-{self.key}-{digest(piece)}.safetensors"
        if path.is_file():
            return unpack(path)
        made = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        write_atomic(path, pack(made, path.name))
        return made


def texts_to_tensor(texts: Sequence[str]) -> Tensor:
    """Texts as bytes of JSON, uint8, so that `Parts` can keep them."""
    return torch.frombuffer(bytearray(json.dumps(list(texts)).encode()), dtype=torch.uint8)


def texts_from_tensor(stored: Tensor) -> tuple[str, ...]:
    """The inverse of `texts_to_tensor`."""
    return tuple(json.loads(bytes(stored.tolist())))


def digests(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """The SHA-256 of every file that settings name, since their paths are not stored.

    Args:
        settings: Names and values; a value may hold further settings.
        before: Beginning of the names.

    Returns:
        Name of the setting -> the first 16 hexadecimal digits.
    """
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= digests(value, f"{before}{name}.")
        # a word such as the name of a task is none, even where a file has that name
        elif isinstance(value, str) and (os.path.basename(value) != value or Path(value).suffix):
            for path in (Path(value).expanduser(), Path(f"{value}.json").expanduser()):
                with contextlib.suppress(OSError, ValueError):
                    if path.is_file():
                        found[before + name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def digest(inputs: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:12]
