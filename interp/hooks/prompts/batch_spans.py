"""The spans of a batch of prompts, aligned with the rows of the running batch."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from interp.errors import SpanError
from interp.hooks.model.row_text import RowText
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.seam import Site, attends_to_outputs, running_tokens

TokenSpan = str | int | tuple[int, int]
"""The name of a span, one position, or a half-open range of positions."""


@dataclass(eq=False)
class BatchSpans:
    """The spans of the prompts in a running batch; a prompt may occupy several rows of the batch."""

    prompts: Prompts | None
    """The prompts of the batch; None where the user gave none."""
    _seen: Tensor | None = None
    """Int `[b]`, the most tokens of each row that the model has seen; None before a batch was matched."""
    text: RowText | None = None
    """The text of the rows in the last forward pass."""
    _checked: deque[RowText] = field(default_factory=lambda: deque(maxlen=4))
    """The texts that were checked last; layers with a window may have a text of their own."""
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

        On its first run each row must be the prompt or a first part of it, in one or several forward passes, or go on
        where its cache holds exactly the prompt. A longer row must begin with the tokens of the prompt, as with the
        candidates of assisted generation and prompt lookup. A decoder next to an encoder must run the tokens of the
        prompts, because those of the encoder are another text. Otherwise only lengths are compared, so a different
        batch with suitable lengths is not detected.

        Args:
            site: An attention call of the batch.

        Raises:
            SpanError: If the numbers of rows or the lengths do not match, or a decoder next to an encoder runs other
                tokens.
        """
        self.text = site.text
        if self.prompts is None or any(site.text is checked for checked in self._checked):
            return
        start, rows = site.call.q_start, site.call.q.shape[0]
        before, after = (site.text.count(column) for column in (start, start + site.call.q.shape[2]))
        lengths = torch.tensor(self.lengths(rows))
        if attends_to_outputs(site.module) and not bool(before.any()) and self._agree_with_prompts(site) is False:
            raise SpanError(
                "the given prompts are not the text of the decoder, whose attention interp reads and edits in a model "
                "with an encoder; pass the batch of decoder_input_ids as prompts=, or no prompts."
            )
        if not self._goes_on(before, after, lengths):
            fits = (after <= lengths) | ((before == lengths) & (before > 0))
            if not bool(fits.all()) and (bool(before.any()) or not self._agree_with_prompts(site)):
                raise SpanError(
                    f"the running batch has rows of {(after - before).tolist()} tokens"
                    + (f" after {before.tolist()} in its cache" if bool(before.any()) else "")
                    + f", but the given prompts have {lengths.tolist()} tokens; pass the whole text of that batch, "
                    "from the first token in its cache, as prompts=."
                )
            self._seen = None
        self._seen = after if self._seen is None else torch.maximum(self._repeated(rows), after)
        self._checked.append(site.text)

    def _goes_on(self, before: Tensor, after: Tensor, lengths: Tensor) -> bool:
        """Whether a forward pass can follow those before it in the same batch."""
        if self._seen is None or (len(before) % len(self._seen) and len(self._seen) % len(before)):
            return False
        if not bool(before.any()):
            # the same prompts with the tokens generated since, processed again from the start
            return bool((after >= lengths).all())
        return bool((before <= self._repeated(len(before))).all())

    def _repeated(self, rows: int) -> Tensor:
        """The most tokens seen of each of `rows` rows, which follow from the rows before them."""
        if self._seen is None or len(self._seen) == rows:
            return torch.zeros(rows, dtype=torch.int64) if self._seen is None else self._seen
        if rows > len(self._seen):
            return self._seen.repeat_interleave(rows // len(self._seen))
        return self._seen.view(rows, -1).amax(1)

    def _agree_with_prompts(self, site: Site) -> bool | None:
        """Whether the tokens of each row are those of its prompt as far as both go; None if they are unknown."""
        ids = running_tokens(site.module)
        rows = site.call.q.shape[0]
        if ids is None or self.prompts is None or ids.shape != (rows, site.call.q.shape[2]):
            return None
        each, prompts, text = self.repeat(rows), list(self.prompts), ids.cpu()
        there = (site.text.position >= 0).cpu()
        pairs = ((text[row, there[row]].tolist(), list(prompts[row // each].ids)) for row in range(rows))
        return all(ran[: len(given)] == given[: len(ran)] for ran, given in pairs)

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
