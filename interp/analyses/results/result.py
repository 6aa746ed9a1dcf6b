"""The protocol of results: every result stores, tabulates, summarises and draws itself."""

from importlib import import_module
from pathlib import Path
from typing import Any, Self

from interp.analyses.results import codec
from interp.errors import ScoreError


class Result:
    """Base of the results: dataclasses marked with `codec.result`, whose fields are all that they hold.

    A subclass defines `to_frame` and `summary`. `save`, `load` and `figure` work for all of them.
    """

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON, its tensors next to it in safetensors.

        Each file is written whole or not at all, and the first holds the hash of the second.

        Args:
            path: A file name; ".json" is added where it is missing.

        Returns:
            The path of the JSON file.

        Raises:
            ScoreError: If the files cannot be written.
        """
        return codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Self:
        """Read a result that `save` wrote, bit for bit.

        Args:
            path: The JSON file.
            model: Model that the result must belong to; None to accept any.

        Returns:
            The result.

        Raises:
            ScoreError: If the file holds no such result, or one of another model.
        """
        found = codec.load(path)
        if not isinstance(found, cls):
            raise ScoreError(f"{path} holds a {type(found).__name__}, not a {cls.__name__}; give a file of that type.")
        if model is not None:
            provenance = getattr(found, "provenance", None)
            if provenance is None:
                raise ScoreError(f"{path} does not name the model it belongs to; load it without a model to check.")
            provenance.check_model(model)
        return found

    def to_frame(self) -> Any:
        """The numbers as a pandas DataFrame."""
        raise NotImplementedError

    def summary(self, top: int = 10) -> str:
        """The result as text, for a terminal.

        Args:
            top: Number of heads to list, where heads are listed.

        Returns:
            The text.
        """
        raise NotImplementedError

    def figure(self) -> Any:
        """The result as a plotly figure, see `interp.plots.figure`."""
        # figures belong to an upper floor, so their module is imported on use
        return import_module("interp.plots").figure(self)
