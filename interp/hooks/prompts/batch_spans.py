"""The spans of a batch of prompts, aligned with the rows of the running batch."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from interp.errors import SpanError
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.seam import Site, running_tokens

TokenSpan = str | int | tuple[int, int]
"""The name of a span, one position, or a half-open range of positions."""


@dataclass(eq=False)
class BatchSpans:
    """The spans of the prompts in a running batch; a prompt may occupy several rows of the batch."""

    prompts: Prompts | None
    """The prompts of the batch; None where the user gave none."""
    _matched: bool = False
    _masks: dict[tuple[TokenSpan, int, torch.device], Tensor] = field(default_factory=dict)

    def repeat(self, rows: int) -> int:
        """Compute how many rows each prompt occupies: more than one with beams or num_return_sequences.

        Args:
            rows: Number of rows of the batch.

        Returns:
            Rows of each prompt.

        Raises:
            SpanError: If there are no prompts, or the rows are not a multiple of the prompts.
        """
        if self.prompts is None or rows % len(self.prompts):
            given = "no prompts" if self.prompts is None else f"{len(self.prompts)} prompts"
            raise SpanError(f"the running batch has {rows} rows, but {given} were given; pass that batch as prompts=.")
        return rows // len(self.prompts)

    def lengths(self, rows: int) -> list[int]:
        """The number of prompt tokens in each of the rows of the batch."""
        each = self.repeat(rows)
        return [length for length in (self.prompts.lengths if self.prompts else ()) for _ in range(each)]

    def match(self, site: Site) -> None:
        """Check that a running batch can be the given prompts.

        On its first run a batch must not have rows longer than the prompts, unless they begin with the tokens of the
        prompts, as with the candidates of assisted generation and prompt lookup. Otherwise only lengths are compared,
        so a different batch with suitable lengths is not detected.

        Args:
            site: An attention call of the batch.

        Raises:
            SpanError: If the numbers of rows or the lengths do not match.
        """
        if self.prompts is None or site.call.q_start:
            return
        rows, live = site.call.q.shape[0], site.call.row_live
        real = [site.call.q.shape[2]] * rows if live is None else live.sum(1).tolist()
        lengths = self.lengths(rows)
        if self._matched and all(seen >= length for seen, length in zip(real, lengths, strict=True)):
            # the same prompts with the tokens generated since, processed again from the start
            return
        self._matched = all(
            seen <= length for seen, length in zip(real, lengths, strict=True)
        ) or self._begins_with_prompts(site)
        if not self._matched:
            raise SpanError(
                f"the running batch has rows of {real} tokens, but the given prompts have {list(self.prompts.lengths)} "
                "tokens; pass that batch as prompts=."
            )

    def _begins_with_prompts(self, site: Site) -> bool:
        """Whether the rows that run begin with the tokens of the prompts."""
        ids = running_tokens(site.module)
        rows = site.call.q.shape[0]
        if ids is None or self.prompts is None or ids.shape != (rows, site.call.q.shape[2]):
            return False
        each, prompts = self.repeat(rows), list(self.prompts)
        return all(
            tuple(ids[row, first : first + len(prompts[row // each])].tolist()) == tuple(prompts[row // each].ids)
            for row, first in enumerate(site.first.tolist())
        )

    def mask(self, where: TokenSpan, rows: int, width: int) -> Tensor:
        """Make a mask of a span over positions.

        Args:
            where: The span.
            rows: Number of rows of the batch.
            width: Number of positions.

        Returns:
            Bool `[b width]`.

        Raises:
            SpanError: If the span has a name and there are no prompts, or a prompt does not have the span.
        """
        if not isinstance(where, str):
            start, stop = (where, where + 1) if isinstance(where, int) else where
            place = torch.arange(width)
            return ((place >= start) & (place < stop)).expand(rows, -1)
        if self.prompts is None:
            raise SpanError(f"span {where!r} was requested without prompts; pass the running batch as prompts=.")
        longest = max(width, *self.prompts.lengths)
        return self.prompts.span_mask(where, longest)[:, :width].repeat_interleave(self.repeat(rows), 0)

    def at(self, where: TokenSpan, position: Tensor) -> Tensor:
        """Test whether keys belong to a span.

        Args:
            where: The span.
            position: Int `[b k]` positions of the keys in their prompts.

        Returns:
            Bool `[b k]`.
        """
        if not isinstance(where, str):
            start, stop = (where, where + 1) if isinstance(where, int) else where
            return (position >= max(start, 0)) & (position < stop)
        key = (where, position.shape[0], position.device)
        if key not in self._masks:
            width = max(self.prompts.lengths) if self.prompts else 1
            self._masks[key] = self.mask(where, position.shape[0], width).to(position.device)
        mask = self._masks[key]
        inside = (position >= 0) & (position < mask.shape[1])
        return mask.gather(1, position.clamp(0, mask.shape[1] - 1)) & inside

    def has(self, where: TokenSpan, rows: int) -> Tensor:
        """Test whether the prompt of each row has a token in a span, regardless of what a cache still holds.

        Args:
            where: The span.
            rows: Number of rows of the batch.

        Returns:
            Bool `[b]`.
        """
        lengths = torch.tensor(self.lengths(rows))
        width = int(lengths.max())
        return (self.mask(where, rows, width) & (torch.arange(width)[None] < lengths[:, None])).any(1)
