"""The spans of a batch of prompts, bound to the rows of the batch that runs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from interp.errors import SpanError
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.seam import Site

TokenSpan = str | int | tuple[int, int]
"""a named span, one position, or a half-open range of positions"""


@dataclass(eq=False)
class BatchSpans:
    """Prompts, or none, as the attention calls of a batch see them; a prompt may have several rows of the batch."""

    prompts: Prompts | None
    _matched: bool = False
    _masks: dict[tuple[TokenSpan, int, torch.device], Tensor] = field(default_factory=dict)

    def repeat(self, rows: int) -> int:
        """How many rows of the batch one prompt has: more than one with beams or num_return_sequences."""
        if self.prompts is None or rows % len(self.prompts):
            given = "no prompts" if self.prompts is None else f"{len(self.prompts)} prompts"
            raise SpanError(f"a batch of {rows} rows runs and {given} were given: pass the batch itself as prompts=.")
        return rows // len(self.prompts)

    def lengths(self, rows: int) -> list[int]:
        """Tokens of the prompt of each row."""
        each = self.repeat(rows)
        return [length for length in (self.prompts.lengths if self.prompts else ()) for _ in range(each)]

    def match(self, site: Site) -> None:
        """Refuse a batch that cannot be the prompts that were given: longer than they are, the first time it runs.

        Lengths are all that is seen here; another batch of lengths that fit goes unnoticed.
        """
        if self.prompts is None or site.call.q_start:
            return
        rows, live = site.call.q.shape[0], site.call.row_live
        real = [site.call.q.shape[2]] * rows if live is None else live.sum(1).tolist()
        lengths = self.lengths(rows)
        if self._matched and all(seen >= length for seen, length in zip(real, lengths, strict=True)):
            # the same prompts with what was generated since, read again from the start
            return
        self._matched = all(seen <= length for seen, length in zip(real, lengths, strict=True))
        if not self._matched:
            raise SpanError(
                f"a batch with rows of {real} tokens runs and the prompts given have {list(self.prompts.lengths)}: "
                "pass the batch itself as prompts=."
            )

    def mask(self, where: TokenSpan, rows: int, width: int) -> Tensor:
        """Bool [b width] over positions: the span of each row."""
        if not isinstance(where, str):
            start, stop = (where, where + 1) if isinstance(where, int) else where
            place = torch.arange(width)
            return ((place >= start) & (place < stop)).expand(rows, -1)
        if self.prompts is None:
            raise SpanError(f"span {where!r} has no meaning without prompts: pass the batch as prompts=.")
        longest = max(width, *self.prompts.lengths)
        return self.prompts.span_mask(where, longest)[:, :width].repeat_interleave(self.repeat(rows), 0)

    def at(self, where: TokenSpan, position: Tensor) -> Tensor:
        """Bool, like `position` [b k]: whether a key, by its position in the prompt, belongs to the span."""
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
        """Bool [b]: whether the prompt of each row has a token in the span, whatever a cache still holds of it."""
        lengths = torch.tensor(self.lengths(rows))
        width = int(lengths.max())
        return (self.mask(where, rows, width) & (torch.arange(width)[None] < lengths[:, None])).any(1)
