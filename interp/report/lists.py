"""Lists in sentences."""

from collections.abc import Sequence


def joined(parts: Sequence[str]) -> str:
    """Parts as "a", "a and b", or "a, b and c".

    Args:
        parts: At least one text.
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
