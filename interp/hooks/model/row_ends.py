"""Ends of the rows of a batch in generate(), which goes on feeding a row after its end until every row has ended."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

OPEN = 1 << 62
"""End of a row that has not ended."""


@dataclass(eq=False)
class NotedEnds:
    """The ends of rows in one generate()."""

    ends: Tensor | None = None
    """Int `[b]`, the column at which the text of each row ends; None where no row has ended."""
    seen: int = 0
    """Number of columns that the model had seen at the last step."""

    def step(self, done: Tensor, seen: int) -> None:
        """Note the rows that have ended after a step.

        Args:
            done: Bool `[b]`, the rows that have ended.
            seen: Number of columns that the model has seen.
        """
        self.seen = seen
        if self.ends is not None or bool(done.any()):
            before = torch.full(done.shape, OPEN, device=done.device) if self.ends is None else self.ends
            # the token that ends a row would be fed next, and no text follows from it
            self.ends = torch.where(done & (before == OPEN), seen, before)

    def before(self, seen: int) -> None:
        """Prepare for the next forward pass, where the ends are not noted after each step.

        Args:
            seen: Number of columns that the model has seen.
        """


@dataclass(eq=False)
class Generation:
    """The columns that a model has seen, and the ends of the rows of the generate() that runs."""

    seen: int = 0
    """Number of columns of the last forward pass, those of the cache included."""
    _noted: "weakref.ref[NotedEnds] | None" = None

    def begin(self, noted: NotedEnds) -> None:
        """Follow a generate() that begins, as long as it holds `noted`."""
        self._noted = weakref.ref(noted)

    def ends(self, batch: int, columns: int) -> Tensor | None:
        """Return the column at which the text of each row ends.

        Args:
            batch: Number of rows of a forward pass.
            columns: Number of its columns, those of the cache included.

        Returns:
            Tensor or None: Int `[b]`; None where no row has ended.
        """
        noted = None if self._noted is None else self._noted()
        if noted is not None and columns > self.seen:
            noted.before(self.seen)
        self.seen = columns
        # a step of generate() has more columns than the step before; another run may not
        if noted is None or noted.ends is None or len(noted.ends) != batch or columns <= noted.seen:
            return None
        return noted.ends
