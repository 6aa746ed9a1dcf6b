"""Assembly of a capture's results: chunks of prefill and decode steps, in columns, become positions of the prompt."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.hooks.model.row_text import RowText
from interp.hooks.read.reductions import Keep, TopKeys
from interp.hooks.seam import Site

Order = tuple[Tensor, Tensor]
"""Int [b r], the index of each result among the stored rows, and its position, -1 where a prompt has fewer."""


@dataclass(eq=False)
class ReadRows:
    """The positions of the queries that were read, chunk by chunk, and the text of each row of the batch."""

    batch: int = 0
    text: RowText | None = None
    """The text of the rows, up to the last column that the model has seen."""
    positions: list[Tensor] = field(default_factory=list)
    """Int [b r] of each chunk, -1 outside of the text."""
    end: int = 0
    """One past the last column that the model has seen."""

    def add(self, site: Site, index: Tensor | None) -> None:
        """Add the rows of one attention call; `index` selects the queries that are read, None for all."""
        call = site.call
        if call.q_start < self.end:
            raise UsageError(_second_run(site.call.q_start))
        if index is None and not self.positions:
            _warn_of_cache(site)
        self.end = call.q_start + call.q.shape[2]
        self.text = site.text
        self.positions.append(site.text.at(call.rows if index is None else call.rows[index]).cpu())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each row so far, without padding and without tokens after its end."""
        return () if self.text is None else tuple(self.text.count(self.end).tolist())

    def columns(self) -> Tensor:
        """Int [b n], the column of each position, -1 where a row has fewer; n is the longest row."""
        if self.text is None:
            return torch.empty(self.batch, 0, dtype=torch.int64)
        places = torch.arange(max(self.lengths), device=self.text.position.device)
        return self.text.columns(places.expand(self.batch, -1)).cpu()

    def order(self, chosen: Callable[[Tensor], Tensor]) -> Order:
        """List the chosen rows of each prompt; `chosen` maps positions [b r] to Bool [b r]."""
        if not self.positions:
            raise UsageError("nothing was read: run the model inside the context, on queries that the capture reads.")
        position = torch.cat(self.positions, 1)
        valid = (position >= 0) & chosen(position)
        count = int(valid.sum(1).max()) if valid.numel() else 0
        index = torch.argsort((~valid).to(torch.int8), dim=1, stable=True)[:, :count]
        return index, position.gather(1, index).masked_fill(~valid.gather(1, index), -1)


def _warn_of_cache(site: Site) -> None:
    """Warn that the first query of a run is not the first token, where all queries are read."""
    cached = site.text.count(site.call.q_start).tolist()
    if any(cached):
        warnings.warn(
            f"the cache already holds {', '.join(map(str, cached[:4]))} tokens of the rows, so index 0 of the results "
            "by query is not position 0; cap.queries has the position of each.",
            stacklevel=2,
        )


def _second_run(q_start: int) -> str:
    """The message for a call whose queries begin before the end of those that were read."""
    if q_start:
        return (
            "the model went back to earlier tokens of its cache, as assisted generation and prompt lookup do for "
            "candidates that are rejected, or it calls attention twice in a layer, which a capture cannot read; "
            "generate without an assistant and without prompt_lookup_num_tokens."
        )
    return (
        "this capture already holds an earlier run, and the model began again at the first token; open a new capture "
        "for each forward() or generate(), and generate with use_cache=True, because generation without a cache reads "
        "the prompt anew at each step."
    )


@dataclass(eq=False)
class Chunks:
    """The results of one reduction in one layer, chunk by chunk, each moved to the CPU when it is made."""

    keep: Keep
    parts: list[Any] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def add(self, k_start: int, value: Any) -> None:
        """Add the result of one attention call, whose first key is at column `k_start`."""
        if self.keep.kind == "keys" and self.parts:
            # one running total instead of one entry per step
            value = _accumulate(self.parts.pop(), self.starts.pop(), value, k_start, self.keep)
            self.starts.append(0)
        else:
            self.starts.append(k_start)
        self.parts.append(_host(value))

    def assemble(self, rows: ReadRows, order: Order) -> Any:
        """Join the chunks into the result by positions, [b h ...]."""
        kind = self.keep.kind
        if kind == "keys":
            return self._keys(rows)
        if kind == "blocks":
            return _blocks(self.parts)
        if kind == "full":
            fill = -torch.inf if getattr(self.keep, "logits", False) else 0.0
            wide = [_at_columns(p, s, rows.end, fill) for p, s in zip(self.parts, self.starts, strict=True)]
            return _at_positions(_pick(_join(wide), order, torch.nan), rows, fill)
        if isinstance(self.keep, TopKeys):
            found = _pick(_join([key for key, _ in self.parts]), order, -1)
            if rows.text is not None and not rows.text.plain:
                position = rows.text.position.cpu().gather(1, found.clamp(min=0).flatten(1)).view(found.shape)
                found = torch.where(found < 0, -1, position)
            return found, _pick(_join([probs for _, probs in self.parts]), order, torch.nan)
        return _pick(_join(self.parts), order, torch.nan)

    def _keys(self, rows: ReadRows) -> Tensor:
        received, seen = (_at_columns(part, self.starts[0], rows.end, 0.0) for part in self.parts[0])
        if getattr(self.keep, "stat", "") == "mean":
            received = received / seen.clamp(min=torch.finfo(seen.dtype).tiny)
        return _at_positions(received, rows, torch.nan)


def _host(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_host(part) for part in value)
    return value.to("cpu", non_blocking=False).clone() if isinstance(value, Tensor) else value


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate chunks along their queries."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _pick(x: Tensor, order: Order, fill: float) -> Tensor:
    """Select each prompt's rows in order: [b h R ...] -> [b h r ...]."""
    index, position = order
    shape = (index.shape[0], 1, index.shape[1], *([1] * (x.dim() - 3)))
    size = (-1, x.shape[1], -1, *x.shape[3:])
    identity = torch.arange(x.shape[2])
    if index.shape[1] == x.shape[2] and bool((index == identity).all()):
        picked = x
    else:
        picked = x.gather(2, index.view(shape).expand(size))
    absent = position < 0
    return picked.masked_fill(absent.view(shape), fill) if bool(absent.any()) else picked


def _at_columns(x: Tensor, start: int, end: int, fill: float) -> Tensor:
    """Pad keys that begin at column `start` to columns 0 to `end`: [... k] -> [... end]."""
    if start == 0 and x.shape[-1] == end:
        return x
    return torch.nn.functional.pad(x, (start, end - start - x.shape[-1]), value=fill)


def _at_positions(x: Tensor, rows: ReadRows, fill: float) -> Tensor:
    """Move keys from columns to positions: [b ... end] -> [b ... n], where n is the longest row."""
    if rows.text is not None and rows.text.plain:
        return x
    columns = rows.columns()
    view = (x.shape[0], *([1] * (x.dim() - 2)), columns.shape[1])
    index = columns.clamp(min=0).view(view).expand(*x.shape[:-1], columns.shape[1])
    return x.gather(-1, index).masked_fill((columns < 0).view(view), fill)


def _accumulate(total: Any, total_start: int, value: Any, start: int, keep: Keep) -> Any:
    """Add a chunk to the running total of a column statistic, over as many columns as the newest chunk has."""
    end = start + value[0].shape[-1]
    before = tuple(_at_columns(part, total_start, max(end, total_start + part.shape[-1]), 0.0) for part in total)
    now = tuple(_at_columns(part.cpu(), start, before[0].shape[-1], 0.0) for part in value)
    largest = getattr(keep, "stat", "") == "max"
    received = torch.maximum(before[0], now[0]) if largest else before[0] + now[0]
    return received, before[1] + now[1]


def _blocks(parts: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Means over the queries of each block, [b h n m], from the sums of every chunk."""
    n = max(start + sums.shape[2] for start, sums, _ in parts)
    m = max(sums.shape[3] for _, sums, _ in parts)
    b, h = parts[0][1].shape[:2]
    total, rows = parts[0][1].new_zeros(b, h, n, m), parts[0][2].new_zeros(b, n)
    for start, sums, count in parts:
        total[:, :, start : start + sums.shape[2], : sums.shape[3]] += sums
        rows[:, start : start + count.shape[1]] += count
    return total / rows[:, None, :, None].clamp(min=1)
