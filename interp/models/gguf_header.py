"""The header of a GGUF file, read within the bounds of the file, before a library reads it."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from interp.errors import ModelError
from interp.hooks.limits import check_regular, shortened

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 100_000
"""entries of metadata, or tensors"""
MAX_NAME_BYTES = 64 << 10
MAX_STRING_BYTES = 16 << 20
"""a chat template is the longest text of a header"""
STRING, ARRAY = 8, 9
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file."""

    metadata: dict[str, Any]
    """numbers and texts; of an array only its length"""
    tensors: dict[str, tuple[int, ...]]
    """shape of each tensor"""

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return sum(map(math.prod, self.tensors.values()))

    @property
    def n_blocks(self) -> int:
        """Number of layers that have tensors."""
        return len({name.split(".")[1] for name in self.tensors if name.startswith("blk.") and name.count(".") > 1})


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Args:
        path: The file.

    Returns:
        The header.

    Raises:
        ModelError: If the file is no GGUF file, is cut off, holds more than 100,000 entries, has a number of layers
            that its tensors do not have, or names a tensor twice.
    """
    size = check_regular(path, ModelError, None)
    try:
        with path.open("rb") as file:
            header = _Reader(file, size).header()
    except (EOFError, OSError, ValueError, struct.error) as error:
        raise ModelError(f"{path} cannot be loaded: its header is broken ({error}); download it again.") from error
    architecture = header.metadata.get("general.architecture", "")
    blocks = header.metadata.get(f"{architecture}.block_count")
    if blocks != header.n_blocks:
        stated = shortened(str(blocks))
        raise ModelError(
            f"{path} states {stated} layers (block_count), but holds the weights of {header.n_blocks}; download or "
            "convert it again."
        )
    return header


class _Reader:
    """Reads numbers and texts, and never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def header(self) -> GgufHeader:
        if self.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self.number(4)) not in VERSIONS:
            raise ValueError(f"it has version {version}, and versions 2 and 3 of little-endian files can be read")
        n_tensors, n_entries = self.count(), self.count()
        metadata: dict[str, Any] = {}
        for _ in range(n_entries):
            name = self.text(MAX_NAME_BYTES)
            metadata[name] = self.value(self.number(4))
        tensors: dict[str, tuple[int, ...]] = {}
        for _ in range(n_tensors):
            name = self.text(MAX_NAME_BYTES)
            if name in tensors:
                raise ValueError(f"it names the tensor {shortened(name)!r} twice")
            if (n_axes := self.number(4)) > 8:
                raise ValueError(f"the tensor {shortened(name)!r} has {n_axes} axes")
            tensors[name] = tuple(self.number(10) for _ in range(n_axes))
            # its type and where it begins
            self.take(12)
            # no type takes less than a bit for a weight
            if math.prod(tensors[name]) > 8 * self.size:
                raise ValueError(f"the tensor {shortened(name)!r} is larger than the file")
        return GgufHeader(metadata, tensors)

    def take(self, n: int) -> bytes:
        if n > self.size - self.file.tell():
            raise EOFError("the file ends inside of it")
        return self.file.read(n)

    def number(self, kind: int) -> Any:
        form = "<" + FORMATS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self) -> int:
        found = self.number(10)
        if found > MAX_ENTRIES:
            raise ValueError(f"it states {found:,} entries")
        return found

    def text(self, limit: int) -> str:
        if (n := self.number(10)) > limit:
            raise ValueError(f"it holds a text of {n:,} bytes")
        return self.take(n).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text(MAX_STRING_BYTES)
        if kind != ARRAY:
            if kind not in FORMATS:
                raise ValueError(f"it holds an entry of the unknown type {kind}")
            return self.number(kind)
        inner, n = self.number(4), self.number(10)
        # every element takes at least a byte
        if n > self.size or depth > 4:
            raise ValueError(f"it holds an array of {n:,} elements")
        if inner in FORMATS:
            self.take(n * struct.calcsize("<" + FORMATS[inner]))
        else:
            for _ in range(n):
                self.value(inner, depth + 1)
        return n
