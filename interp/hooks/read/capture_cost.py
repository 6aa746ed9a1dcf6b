"""The host memory that the results of a capture take."""

from dataclasses import dataclass

from interp.errors import CostError

MAX_MEMORY_SHARE = 0.8
"""Share of the free memory that the results of a capture may take."""


@dataclass(frozen=True)
class CaptureCost:
    """Host memory of the results of a capture, in bytes; made by `Capture.cost`, and printed as a table."""

    parts: tuple[tuple[str, int], ...]
    """Each reduction, as it prints, and its bytes."""
    free: int
    """Free memory, in bytes."""

    @property
    def total(self) -> int:
        """Bytes of all reductions together."""
        return sum(size for _, size in self.parts)

    @property
    def fits(self) -> bool:
        """Whether the total is at most 80 % of the free memory."""
        return self.total <= MAX_MEMORY_SHARE * self.free

    def __str__(self) -> str:
        lines = [f"{name:32s} {format_bytes(size):>10s}" for name, size in self.parts]
        total = f"{'in all':32s} {format_bytes(self.total):>10s} of {format_bytes(self.free)} free"
        return "\n".join([*lines, total])


@dataclass
class StoredResults:
    """The results that a capture stores, call by call."""

    size: int = 0
    """Bytes of the results so far."""

    def add(self, cost: CaptureCost, n_keys: int) -> None:
        """Add the results of one attention call, before they are computed.

        Args:
            cost: The cost of the call.
            n_keys: Number of keys of the call, for the message.

        Raises:
            CostError: If they do not fit into the free memory together with earlier ones.
        """
        # earlier results are stored already, and are copied once more when they are joined
        needed = cost.total + self.size
        self.size += cost.total // 2
        if needed > MAX_MEMORY_SHARE * cost.free:
            raise CostError(
                f"this capture needs {format_bytes(needed)} for {n_keys:,} tokens "
                f"and {format_bytes(cost.free)} is free: "
                "read fewer layers, heads or queries, or a reduction instead of rows."
            )


def format_bytes(size: float) -> str:
    """Write a number of bytes with its unit, as in "1.5 MB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
