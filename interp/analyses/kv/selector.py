"""Which keys of the prompt a head may still see: the frame of every method that drops keys from a cache."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analyses.kv.shares import rest, unwindowed
from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, EditContext
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.kernels.contract import Call


@dataclass(frozen=True, eq=False)
class Kept:
    """What a selector noted of one layer when the prompt had been read."""

    kept: Bool[Tensor, "b g n"]
    """by position in the prompt"""
    window: Int[Tensor, "b g"] | None = None
    """how many keys before its own a later token sees beside the first ones; None where the kept keys stay"""
    more: Any = None
    """what else a selector has to remember"""


@dataclass(frozen=True)
class KeySelector(Edit):
    """Base of the selectors. Tokens of the prompt see all keys, as the model does; tokens after it see the kept keys of
    the prompt, and every key after it; of a selector that `rolls`, the last keys alone, as many as were kept.

    kept[b g k] for each kv head, whose query heads share a cache: round(share * n) of n keys, the first `sink` of the
    prompt before all others, then the last `recent`, then those that `rank` puts highest. Where the share is smaller
    than these two, nothing is left to rank. `full` names heads whose kv heads keep everything; the others get less, so
    that the model's share is what was asked. Layers with a window of their own are left as they are, and out of the
    share: they drop keys by themselves.
    A selector is a dataclass with its settings and one method: rank(here) -> Float [b g k].
    Source: ours; what the methods of this folder have in common. Cannot show: what dropping keys while the prompt is
    read would do; windows that roll over a reply read at once take memory by the square of its length.
    """

    share: float = 0.25
    sink: int = 4
    recent: int = 8
    full: str = ""
    """anything HeadSet.parse takes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.full, str):
            object.__setattr__(self, "full", str(HeadSet.parse(self.full)))
        if self.heads != "all":
            # other query heads of a kv head would meet keys that are gone from their cache
            raise UsageError(f"heads={self.heads!r}: a selector acts on all heads; name those that keep all as full=.")
        if not 0 < self.share <= 1:
            raise UsageError(f"share={self.share} is not in (0, 1]: it is the part of the prompt's keys that is kept.")
        if min(self.sink, self.recent) < 0 or self.sink + self.recent < 1:
            raise UsageError(f"sink={self.sink}, recent={self.recent}: give numbers of 0 or more, one of them above 0.")

    @property
    def is_noop(self) -> bool:
        return self.share == 1

    @property
    def transferable(self) -> bool:
        return False

    @property
    def rolls(self) -> bool:
        """Whether the last keys stay the last ones as the text goes on, so that a cache does not grow."""
        return False

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        """What is kept first, of keys that are neither among the first nor the last: higher before lower, 0 or more."""
        raise NotImplementedError

    def remember(self, here: EditContext, kept: Bool[Tensor, "b g n"]) -> Any:
        """What else is noted when the prompt was read; nothing by default."""
        return None

    def spread(self, here: EditContext) -> Float[Tensor, "b g"]:
        """Share of the prompt's keys that each kv head keeps; the same for all prompts unless a method reads them."""
        layout = self.layout(here)
        shares = self.budgets(layout, unwindowed(here.site.module, layout.layers))
        return shares[here.site.layer][None].expand(here.call.sizes[0], -1)

    def budgets(self, layout: HeadLayout, choose: Bool[Tensor, "l"]) -> Float[Tensor, "l g"]:
        """Share of the prompt's keys that each kv head keeps; over the layers that `choose` names their mean is
        `share`."""
        whole = self.whole(layout)
        return torch.where(whole, 1.0, rest(self.share, whole[choose]))

    def layout(self, here: EditContext) -> HeadLayout:
        """Of the model that runs."""
        return here.steering.layout  # pyright: ignore[reportAttributeAccessIssue]

    def whole(self, layout: HeadLayout) -> Bool[Tensor, "l g"]:
        """The kv heads that keep everything: those of which any query head is named in `full`."""
        named = HeadSet.parse(self.full, layout).mask(layout) if self.full else torch.zeros(layout.layers, layout.heads)
        return named.bool().view(layout.layers, layout.kv_heads, -1).any(-1)

    def apply(self, here: EditContext) -> Call:
        if here.call.window is not None:
            return here.call
        length = here.length
        if bool((here.row_position == length[:, None] - 1).any()):
            chosen, count = self.kept(here, length)
            window = self.reach(here, count) if self.rolls else None
            here.note(Kept(chosen, window, self.remember(here, chosen)))
        noted = here.recall()
        after = here.row_position >= length[:, None]
        if noted is None or not bool(after.any()):
            return here.call
        kept, position = noted.kept, here.key_position
        inside = (position >= 0) & (position < length[:, None])
        place = position.clamp(0, kept.shape[-1] - 1)[:, None].expand(-1, kept.shape[1], -1)
        hidden = (~kept.gather(2, place) & inside[:, None]).int()
        # rows after the prompt, by number, from the first of this call
        row = torch.where(after, here.row_position - length[:, None], -1)
        first = torch.where(after, row, torch.iinfo(row.dtype).max).amin(1, keepdim=True)
        row = torch.where(after, row - first, -1)
        sets = 1
        if noted.window is not None:
            # the number of the row from which on a key is out of its window
            start = (length[:, None] - noted.window + first)[..., None]
            from_row = (position[:, None] - start + 1).clamp(min=0)
            sets = int(row.max()) + 1
            leaves = (from_row < sets) & (position >= self.sink)[:, None]
            hidden = torch.where((hidden == 0) & leaves, from_row.int() + 1, hidden)
        each = here.call.sizes[1] // here.call.sizes[2]
        reached = row[..., None] >= torch.arange(sets, device=row.device)
        coefficient = torch.where(reached, -math.inf, 0.0)[:, None].expand(-1, here.call.sizes[1], -1, -1)
        return here.add_row_bias(coefficient, hidden.repeat_interleave(each, 1))

    def reach(self, here: EditContext, count: Int[Tensor, "b g"]) -> Int[Tensor, "b g"]:
        """As many last keys as were kept beside the first; all for the heads that keep everything."""
        whole = self.whole(self.layout(here))[here.site.layer].to(count.device)
        return torch.where(whole, 1 << 40, (count - self.sink).clamp(min=max(self.recent, 1)))

    def kept(self, here: EditContext, length: Tensor) -> tuple[Bool[Tensor, "b g n"], Int[Tensor, "b g"]]:
        """By position in the prompt, for the layer at hand, and how many they are."""
        position = here.key_position
        inside = (position >= 0) & (position < length[:, None])
        rank = self.rank(here).float()
        n = length[:, None]
        # forced ones in order of need: the first, the last, then by rank
        top = rank.masked_fill(~inside[:, None], -math.inf).amax(-1, keepdim=True).clamp(min=1e-30)
        last = (2 + position / n)[:, None]
        score = torch.where((position >= n - self.recent)[:, None], last, rank / top)
        score = score.masked_fill((position < self.sink)[:, None], 4.0).masked_fill(~inside[:, None], -math.inf)
        count = (self.spread(here).to(score.device) * n).round().clamp(min=1).long()
        order = score.argsort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(score.shape[-1], device=score.device).expand_as(order)
        place = torch.empty_like(order).scatter_(-1, order, ranks.contiguous())
        chosen = (place < count[..., None]) & inside[:, None]
        # from columns to positions
        at = torch.arange(int(length.max()), device=score.device)
        column = at + here.site.first[:, None] - here.call.k_start
        there = (at < n) & (column >= 0) & (column < chosen.shape[-1])
        place = column.clamp(0, chosen.shape[-1] - 1)[:, None].expand(-1, chosen.shape[1], -1)
        return chosen.gather(2, place) & there[:, None], count
