"""Errors of the package. Each message says what was given, what was expected and what to do."""

MAX_MESSAGE = 1500
"""characters of a message; an input that it quotes may be of any length"""


class InterpError(Exception):
    """Base class of every error that interp raises on purpose.

    A longer message than 1,500 characters is cut in the middle, so that what was given and what to do remain.
    """

    def __init__(self, message: str = "") -> None:
        half = MAX_MESSAGE // 2
        super().__init__(message if len(message) <= MAX_MESSAGE else f"{message[:half]} ... {message[-half:]}")


class HeadError(InterpError, ValueError):
    """A head, layer or head set that cannot be parsed or that the model does not have."""


class SpanError(InterpError, ValueError):
    """A named span that is not in its prompt, or that no prompt defines."""


class PromptError(InterpError, ValueError):
    """A prompt that cannot be used: empty, too long for the model, or with a doubled BOS."""


class CostError(InterpError, MemoryError):
    """A capture that does not fit into the free memory."""


class ModelError(InterpError, ValueError):
    """A model that cannot be found, is not safe to load, or is of a kind that interp cannot read."""


class ScoreError(InterpError, ValueError):
    """A score file that is broken, or that belongs to another model."""


class RunError(InterpError, ValueError):
    """A run folder that is broken, belongs to another run, or cannot be written."""


class UsageError(InterpError, ValueError):
    """An argument whose value is not valid for the function that received it."""
