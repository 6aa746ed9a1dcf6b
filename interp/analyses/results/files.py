"""Result files: JSON for what is said, safetensors beside it for the tensors, each written whole or not at all."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.errors import ScoreError

_FORMAT = "interp.head_scores/1"


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename over it: a reader never sees half a file. Raises ScoreError."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ScoreError(
            f"{path} cannot be written ({reason(error)}); give a path in a folder that exists and is yours."
        ) from error


def read_text(path: Path) -> str:
    """The text of a file. Raises ScoreError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ScoreError(f"{path} cannot be read as UTF-8 text ({reason(error)}); give a readable file.") from error


def plain(value: Any, what: str) -> Any:
    """`value` as JSON gives it back (tuples become lists). Raises ScoreError where JSON cannot say it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ScoreError(
            f"{what} cannot be written as JSON ({error}); use numbers, texts, lists and tables."
        ) from error


def save(path: str | Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write the pair of files; returns the path of the JSON. Raises ScoreError."""
    from safetensors.torch import save as serialise

    path = Path(path)
    path = path if path.suffix == ".json" else path.with_name(path.name + ".json")
    data = serialise(dict(tensors))
    # tensors first: a kill in between leaves a pair whose hashes disagree, which load refuses
    write_atomic(path.with_suffix(".safetensors"), data)
    content = {"format": _FORMAT, **about, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path


def load(path: str | Path, entries: Mapping[str, Any]) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Read the pair of files; `entries` says what must be there, and of which types. Raises ScoreError."""
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    path = Path(path)
    path = path if path.suffix == ".json" else path.with_name(path.name + ".json")
    try:
        about = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ScoreError):
            raise
        raise ScoreError(f"{path} is not JSON ({error}); the file is broken, make it again.") from error
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        stored = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise ScoreError(f"{path} has the format {stored!r}, not {_FORMAT!r}; give a file that HeadScores.save wrote.")
    for name, kind in entries.items():
        if not isinstance(about.get(name), kind):
            raise ScoreError(f'{path} has no usable "{name}" ({about.get(name)!r}); the file is broken, make it again.')
    beside = path.with_suffix(".safetensors")
    try:
        data = beside.read_bytes()
    except OSError as error:
        raise ScoreError(f"{path} needs {beside.name} beside it, which cannot be read ({reason(error)}).") from error
    if hashlib.sha256(data).hexdigest() != about.get("tensors_sha256"):
        raise ScoreError(f"{beside} does not belong to {path.name}; keep the two files of one save together.")
    try:
        return path, about, deserialise(data)
    except SafetensorError as error:
        raise ScoreError(f"{beside} is not a safetensors file ({error}); make it again.") from error


def joined(tensors: Sequence[Tensor], name: str) -> Tensor:
    """Tensors one after another along the first axis; shorter later axes are filled up with NaN, -1 or False."""
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise ScoreError(f"'{name}' has another number of axes in each part; join only parts of one analysis.")
    widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    grown = []
    for tensor in tensors:
        fill = torch.nan if tensor.is_floating_point() else False if tensor.dtype == torch.bool else -1
        full = tensor.new_full((len(tensor), *widest), fill)
        full[tuple(slice(size) for size in tensor.shape)] = tensor
        grown.append(full)
    return torch.cat(grown)


def reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


@dataclass(frozen=True)
class Parts:
    """Finished pieces of a long computation, a file each, so that a run that was cut goes on where it stood."""

    folder: Path | None
    """None: nothing is kept"""
    name: str
    key: str
    """what all pieces of one computation share, as a hash"""

    @classmethod
    def of(cls, folder: str | Path | None, name: str, what: Any) -> "Parts":
        """what: everything that the numbers depend on, as JSON can say it. Raises ScoreError."""
        if folder is not None:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ScoreError(
                    f"{folder} cannot be made ({reason(error)}); name a folder you may write to."
                ) from error
        return cls(None if folder is None else Path(folder), name, digest(what))

    def get(self, what: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of one piece, from its file where there is one, else made and kept. Raises ScoreError."""
        from safetensors import SafetensorError
        from safetensors.torch import load as deserialise
        from safetensors.torch import save as serialise

        if self.folder is None:
            return make()
        path = self.folder / f"{self.name}-{self.key}-{digest(what)}.safetensors"
        if path.is_file():
            try:
                return deserialise(path.read_bytes())
            except (SafetensorError, OSError) as error:
                raise ScoreError(f"{path} is broken ({error}): delete it and run again.") from None
        made = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        write_atomic(path, serialise(made))
        return made


def digest(what: Any) -> str:
    """A short hash of anything that JSON can say."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:12]
