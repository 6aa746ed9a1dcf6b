"""Ends of the rows of a batch in generate(), which goes on feeding a row after its end until every row has ended."""

import weakref
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class NotedEnds(Protocol):
    """The ends of rows in one generate(), noted by its stopping criteria after each step."""

    ends: Tensor | None
    """Int `[b]`, the column at which the text of each row ends; None where no row has ended."""
    seen: int
    """Number of columns that the model had seen at the last step."""


@dataclass(eq=False)
class Generation:
    """The columns that a model has seen, and the ends of the rows of the generate() that runs."""

    seen: int = 0
    """Number of columns of the last forward pass, those of the cache included."""
    _noted: "weakref.ref[NotedEnds] | None" = None

    def begin(self, noted: NotedEnds) -> None:
        """Follow a generate() that begins; it alone holds `noted`, so that the ends are gone when it returns."""
        self._noted = weakref.ref(noted)

    def ends(self, batch: int, columns: int) -> Tensor | None:
        """Return the column at which the text of each row ends.

        Args:
            batch: Number of rows of a forward pass.
            columns: Number of its columns, those of the cache included.

        Returns:
            Tensor or None: Int `[b]`; None where no row has ended.
        """
        self.seen = columns
        noted = None if self._noted is None else self._noted()
        # a step of generate() has more columns than the step before; another run may not
        if noted is None or noted.ends is None or len(noted.ends) != batch or columns <= noted.seen:
            return None
        return noted.ends
