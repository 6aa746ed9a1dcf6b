"""The text of each row of a running batch: the columns that hold it, and the position of each of its tokens."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import ModelError


@dataclass(eq=False)
class RowText:
    """The position of each column of a running batch in the text of its row.

    A column is a place in the batch or in its cache. It holds no text where it is padding, on either side or between
    two parts of the text, and where generate() feeds a row that has ended.
    """

    position: Int[Tensor, "b n"]
    """Position of the token in each column so far, counted from the first token of its row; -1 for no text."""
    plain: bool = False
    """Whether column i holds the token at position i in every row."""
    cut: bool = False
    """Whether some columns without text may be visible to the model, such as those after the end of a row."""

    @classmethod
    def unpadded(cls, batch: int, n: int, device: torch.device | None) -> "RowText":
        """The text of rows whose n columns all hold a token."""
        return cls(torch.arange(n, device=device).expand(batch, n), plain=True)

    @classmethod
    def of(cls, live: Bool[Tensor, "b n"]) -> "RowText":
        """Count positions as the running sum of the columns that hold text, less one.

        Args:
            live: Whether each column holds a token of the text.
        """
        return cls((live.cumsum(-1) - 1).masked_fill(~live, -1))

    def until(self, ends: Int[Tensor, "b"]) -> "RowText":
        """The same text, which ends in each row before a column."""
        column = torch.arange(self.position.shape[1], device=self.position.device)
        ended = column >= ends.to(column.device)[:, None]
        return RowText(self.position.masked_fill(ended, -1), cut=True)

    def at(self, columns: Int[Tensor, "k"]) -> Int[Tensor, "b k"]:
        """Positions of some columns, the same ones in each row."""
        return self.position.index_select(1, columns)

    def columns(self, position: Int[Tensor, "b *rest"]) -> Int[Tensor, "b *rest"]:
        """Columns of some positions of each row; -1 where a row has no such position."""
        n = self.position.shape[1]
        inside = (position >= 0) & (position < n)
        if self.plain or not n:
            return position.masked_fill(~inside, -1)
        place = position.clamp(0, n - 1).flatten(1)
        return self._column.gather(1, place).view(position.shape).masked_fill(~inside, -1)

    @cached_property
    def _column(self) -> Tensor:
        """Int [b n], the column of each position; -1 where there is none."""
        b, n = self.position.shape
        columns = torch.arange(n, device=self.position.device).expand(b, n)
        # columns without text are written to a place that is cut off
        place = self.position.where(self.position >= 0, n)
        return torch.full((b, n + 1), -1, device=place.device).scatter_(1, place, columns)[:, :n]

    def count(self, column: int) -> Int[Tensor, "b"]:
        """Number of tokens of each row before a column, on the CPU."""
        if self.plain:
            return torch.full((len(self.position),), min(column, self.position.shape[1]))
        return (self.position[:, :column] >= 0).sum(1).cpu()

    @cached_property
    def first(self) -> Int[Tensor, "b"]:
        """Column of the first token of each row, for computations whose positions are columns less the first.

        Raises:
            ModelError: If columns without text lie between two tokens of a row, so that positions are not columns less
                the first.
        """
        n = self.position.shape[1]
        if self.plain or not n:
            return self.position.new_zeros(len(self.position))
        first = self._column[:, 0].where(self._column[:, 0] >= 0, n)
        column = torch.arange(n, device=first.device)
        if bool(((self.position >= 0) & (self.position != column - first[:, None])).any()):
            raise ModelError(
                "the attention mask has padding between two tokens of a row, where blocks of positions and streaming "
                "attention cannot be read; pad all tokens of a row on one side."
            )
        return first
