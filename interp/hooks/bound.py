"""The spans of a batch of prompts, bound to the rows of the batch that runs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from interp.hooks.prompts import Prompts
from interp.hooks.seam import Site
from interp.kernels.errors import SpanError

Where = str | int | tuple[int, int]
"""a named span, one position, or a half-open range of positions"""


@dataclass(eq=False)
class Bound:
    """Prompts, or none, as the attention calls of a batch see them; a prompt may have several rows of the batch."""

    prompts: Prompts | None
    _matched: bool = False
    _masks: dict[tuple[Where, int, int, torch.device], Tensor] = field(default_factory=dict)

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
        """Refuse a batch that cannot be the prompts that were given."""
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

    def mask(self, where: Where, rows: int, width: int) -> Tensor:
        """Bool [b width] over positions: the span of each row."""
        if not isinstance(where, str):
            start, stop = (where, where + 1) if isinstance(where, int) else where
            place = torch.arange(width)
            return ((place >= start) & (place < stop)).expand(rows, -1)
        if self.prompts is None:
            raise SpanError(f"span {where!r} has no meaning without prompts: pass the batch as prompts=.")
        longest = max(width, *self.prompts.lengths)
        return self.prompts.span_mask(where, longest)[:, :width].repeat_interleave(self.repeat(rows), 0)

    def at(self, where: Where, position: Tensor) -> Tensor:
        """Bool, like `position` [b k]: whether a key, by its position in the prompt, belongs to the span."""
        rows, width = position.shape[0], max(1, int(position.shape[1]))
        if isinstance(where, str) and self.prompts is not None:
            width = max(self.prompts.lengths)
        elif isinstance(where, tuple):
            width = max(1, where[1])
        elif isinstance(where, int):
            width = where + 1
        key = (where, rows, width, position.device)
        if key not in self._masks:
            self._masks[key] = self.mask(where, rows, width).to(position.device)
        inside = (position >= 0) & (position < width)
        return self._masks[key].gather(1, position.clamp(0, width - 1)) & inside
