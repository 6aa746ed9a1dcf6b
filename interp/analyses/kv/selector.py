"""KeySelector: the base of the methods that drop keys of a prompt from the cache."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analyses.kv._shares import NO_GLOBAL_LAYERS, global_layers, remaining_ratio
from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, EditContext
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.kernels.contract import Call


@dataclass(frozen=True, eq=False)
class KeptKeys:
    """The choice of a selector in one layer, after the prompt was read."""

    kept: Bool[Tensor, "b g n"]
    """by position in the prompt"""
    window: Int[Tensor, "b g"] | None = None
    """number of keys before its own that a later token sees in addition to the first ones; None where the kept keys are
    fixed"""
    extra: Any = None
    """other facts that a selector remembers, see `KeySelector.remember`"""


@dataclass(frozen=True)
class KeySelector(Edit):
    """Base of the selectors: tokens of the prompt see all keys, tokens after it see the kept keys of the prompt.

    Later tokens also see every key after the prompt. With a selector that `rolls`, they see only the last keys instead,
    as many as were kept.

    `kept[b g k]` belongs to a kv head, whose query heads share a cache: `round(keep_ratio n)` of n keys. The first
    `n_sink` keys of the prompt have precedence, then the last `n_recent`, then those with the highest `rank`. Where the
    share is smaller than these two, nothing is left to rank.

    Heads with a full cache keep everything, and the others keep fewer keys, so that the model keeps `keep_ratio`.
    Layers with a sliding window are unchanged and not counted, since they drop keys themselves.

    A selector is a dataclass with its settings and one method, `rank(here) -> Float [b g k]`.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps, in (0, 1]; 1 changes nothing.
        n_sink: Number of first keys, which are part of `keep_ratio` and kept before all other keys.
        n_recent: Number of last keys, which are part of `keep_ratio` and kept before the ranked keys.
        full_cache_heads: Heads whose kv heads keep everything, as HeadSet.parse takes them.

    Raises:
        UsageError: If a setting is out of range, or `heads` are named.

    Source:
        This package; what the methods of this folder have in common.

    Limits:
        Does not show the effect of dropping keys while the prompt is read. Windows that roll over a reply read in one
        forward pass use memory by the square of its length.
    """

    keep_ratio: float = 0.25
    n_sink: int = 4
    n_recent: int = 8
    full_cache_heads: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.full_cache_heads, str):
            object.__setattr__(self, "full_cache_heads", str(HeadSet.parse(self.full_cache_heads)))
        if self.heads != "all":
            # other query heads of a kv head would miss keys that were evicted from their cache
            raise UsageError(
                f"heads={self.heads!r}, but a selector acts on all heads; name heads that keep everything as "
                "full_cache_heads."
            )
        if not 0 < self.keep_ratio <= 1:
            raise UsageError(
                f"keep_ratio={self.keep_ratio} is not in (0, 1]; give the share of the prompt's keys that is kept."
            )
        if min(self.n_sink, self.n_recent) < 0 or sum(self.forced) < 1:
            raise UsageError(
                f"n_sink={self.n_sink}, n_recent={self.n_recent}; give numbers of at least 0, one of them above 0."
            )

    @property
    def is_noop(self) -> bool:
        return self.keep_ratio == 1

    @property
    def transferable(self) -> bool:
        return False

    @property
    def rolls(self) -> bool:
        """Whether the window of last keys moves with the text, so that a cache does not grow."""
        return False

    @property
    def forced(self) -> tuple[int, int]:
        """Number of first and of last keys of the prompt that are kept before all others; a control keeps them too."""
        return self.n_sink, self.n_recent

    def rank(self, here: EditContext) -> Float[Tensor, "b g k"]:
        """Rank of each key that is neither among the first nor the last; high ranks, 0 or more, are kept first."""
        raise NotImplementedError

    def remember(self, here: EditContext, kept: Bool[Tensor, "b g n"]) -> Any:
        """Further facts to note after the prompt was read; None by default.

        Args:
            here: The attention call of the prompt.
            kept: The keys that are kept, by position.

        Returns:
            Anything that the selector needs for later tokens.
        """
        return None

    def spread(self, here: EditContext) -> Float[Tensor, "b g"]:
        """Share of the prompt's keys that each kv head keeps, by default the same for all prompts."""
        layout = self.layout(here)
        shares = self.budgets(layout, global_layers(here.site.module, layout.layers))
        return shares[here.site.layer][None].expand(here.call.sizes[0], -1)

    def counts(self, here: EditContext, length: Int[Tensor, "b"]) -> Int[Tensor, "b g"]:
        """Number of the prompt's keys that each kv head keeps.

        Args:
            here: The attention call of the prompt.
            length: Number of tokens of each prompt.

        Returns:
            The numbers `[b g]`.
        """
        return (self.spread(here).to(length.device) * length[:, None]).round().long()

    def budgets(self, layout: HeadLayout, choose: Bool[Tensor, "l"]) -> Float[Tensor, "l g"]:
        """Share of the prompt's keys that each kv head keeps.

        Args:
            layout: Layers and heads of the model.
            choose: Layers in which keys are dropped; over these the mean of the shares is `keep_ratio`.

        Returns:
            The shares `[l g]`.
        """
        full = self.full(layout)
        return torch.where(full, 1.0, remaining_ratio(self.keep_ratio, full[choose]))

    def layout(self, here: EditContext) -> HeadLayout:
        """Layers and heads of the model that runs."""
        return here.steering.layout  # pyright: ignore[reportAttributeAccessIssue]

    def full(self, layout: HeadLayout) -> Bool[Tensor, "l g"]:
        """The kv heads that keep everything: those with a query head in `full_cache_heads`."""
        names = self.full_cache_heads
        named = HeadSet.parse(names, layout).mask(layout) if names else torch.zeros(layout.layers, layout.heads)
        return named.bool().view(layout.layers, layout.kv_heads, -1).any(-1)

    def apply(self, here: EditContext) -> Call:
        if here.call.window is not None:
            if here.call.q.shape[2] > 1 and not bool(global_layers(here.site.module, 1).any()):
                raise UsageError(NO_GLOBAL_LAYERS)
            return here.call
        length = here.length
        ends = (here.row_position == length[:, None] - 1).any(1)
        if bool(ends.any()):
            if not bool(ends.all()):
                raise UsageError(
                    "the prompts of this batch end in different forward passes, so no call has the keys and queries "
                    "of all of them; pad them on the left, so that they end together."
                )
            chosen, count = self.kept(here, length)
            window = self.reach(here, count) if self.rolls else None
            here.note(KeptKeys(chosen, window, self.remember(here, chosen)))
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
            # the first row for which a key is out of its window
            start = (length[:, None] - noted.window + first)[..., None]
            from_row = (position[:, None] - start + 1).clamp(min=0)
            sets = int(row.max()) + 1
            leaves = (from_row < sets) & (position >= self.n_sink)[:, None]
            hidden = torch.where((hidden == 0) & leaves, from_row.int() + 1, hidden)
        each = here.call.sizes[1] // here.call.sizes[2]
        reached = row[..., None] >= torch.arange(sets, device=row.device)
        coefficient = torch.where(reached, -math.inf, 0.0)[:, None].expand(-1, here.call.sizes[1], -1, -1)
        return here.add_row_bias(coefficient, hidden.repeat_interleave(each, 1))

    def reach(self, here: EditContext, count: Int[Tensor, "b g"]) -> Int[Tensor, "b g"]:
        """Number of last keys that were kept in addition to the first; all for heads that keep everything.

        Args:
            here: The attention call of the prompt.
            count: Number of kept keys.

        Returns:
            The numbers `[b g]`.
        """
        full = self.full(self.layout(here))[here.site.layer].to(count.device)
        return torch.where(full, 1 << 40, (count - self.n_sink).clamp(min=max(self.n_recent, 1)))

    def kept(self, here: EditContext, length: Tensor) -> tuple[Bool[Tensor, "b g n"], Int[Tensor, "b g"]]:
        """The kept keys of one layer by position in the prompt, and their number.

        Args:
            here: The attention call of the prompt.
            length: Number of tokens of each prompt, `[b]`.

        Returns:
            The kept keys `[b g n]`, and their number `[b g]`.
        """
        position = here.key_position
        inside = (position >= 0) & (position < length[:, None])
        rank = self.rank(here).float()
        n = length[:, None]
        n_first, n_last = self.forced
        # the first keys before all others, then the last, then by rank
        top = rank.masked_fill(~inside[:, None], -math.inf).amax(-1, keepdim=True).clamp(min=1e-30)
        last = (2 + position / n)[:, None]
        score = torch.where((position >= n - n_last)[:, None], last, rank / top)
        score = score.masked_fill((position < n_first)[:, None], 4.0).masked_fill(~inside[:, None], -math.inf)
        count = self.counts(here, length).clamp(min=1)
        order = score.argsort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(score.shape[-1], device=score.device).expand_as(order)
        place = torch.empty_like(order).scatter_(-1, order, ranks.contiguous())
        chosen = (place < count[..., None]) & inside[:, None]
        # from columns to positions
        at = torch.arange(int(length.max()), device=score.device)
        column = here.site.text.columns(at.expand(len(length), -1)) - here.call.k_start
        there = (at < n) & (column >= 0) & (column < chosen.shape[-1])
        place = column.clamp(0, chosen.shape[-1] - 1)[:, None].expand(-1, chosen.shape[1], -1)
        return chosen.gather(2, place) & there[:, None], count
