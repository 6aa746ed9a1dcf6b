"""A bug that `tests/mutants.py` plants."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A bug that changes numbers, labels or verdicts without an error."""

    name: str
    """What is wrong with it."""
    file: str
    before: str
    """A text that occurs once in the file."""
    after: str
    tests: tuple[str, ...]
    """Arguments of pytest for the tests that have to catch it."""
