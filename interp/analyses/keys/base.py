"""Which keys of the prompt a head may still see: the frame of every method that drops keys from a cache."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.analyses.scores import HeadScores
from interp.hooks.edit import Edit, Here, Steering, steering
from interp.hooks.heads import HeadLayout, HeadSet
from interp.hooks.modules import attention_layers
from interp.hooks.prompts import Prompts
from interp.kernels.contract import Call
from interp.kernels.errors import UsageError


@dataclass(frozen=True, eq=False)
class Kept:
    """What a selector noted of one layer when the prompt had been read."""

    kept: Bool[Tensor, "b g n"]
    """by position in the prompt"""
    more: Any = None
    """what else a selector has to remember"""


@dataclass(frozen=True)
class KeySelector(Edit):
    """Base of the selectors. Tokens of the prompt see all keys, as the model does; tokens after it see the kept keys of
    the prompt, and every key after it.

    kept[b g k] for each kv head, whose query heads share a cache: the first `sink` and the last `recent` keys of the
    prompt, and of the rest those that `rank` puts highest, round(share * n) of n keys in all. `full` names heads whose
    kv heads keep everything; the others get less, so that the layer's share, or the model's, is what was asked.
    A selector is a dataclass with its settings and one method: rank(here) -> Float [b g k].
    Source: ours; what the methods of this folder have in common. Cannot show: what dropping keys while the prompt is
    read would do.
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
    def idle(self) -> bool:
        return self.share == 1

    @property
    def movable(self) -> bool:
        return False

    def rank(self, here: Here) -> Float[Tensor, "b g k"]:
        """What is kept first, of keys that are neither among the first nor the last: higher before lower, 0 or more."""
        raise NotImplementedError

    def remember(self, here: Here, kept: Bool[Tensor, "b g n"]) -> Any:
        """What else is noted when the prompt was read; nothing by default."""
        return None

    def spread(self, here: Here) -> Float[Tensor, "b g"]:
        """Share of the prompt's keys that each kv head keeps; the same for all prompts unless a method reads them."""
        layout = here.steering.layout  # pyright: ignore[reportAttributeAccessIssue]
        shares = self.budget(here.site.layer, self.whole(layout)[here.site.layer], layout)
        return shares[None].expand(here.call.sizes[0], -1)

    def budget(self, layer: int, group: Tensor, layout: HeadLayout) -> Float[Tensor, "g"]:
        """Share of the prompt's keys that each kv head of a layer keeps."""
        return torch.where(group, 1.0, _rest(self.share, self.whole(layout), layout))

    def whole(self, layout: HeadLayout) -> Bool[Tensor, "l g"]:
        """The kv heads that keep everything: those of which any query head is named in `full`."""
        named = HeadSet.parse(self.full, layout).mask(layout) if self.full else torch.zeros(layout.layers, layout.heads)
        return named.bool().view(layout.layers, layout.kv_heads, -1).any(-1)

    def change(self, here: Here) -> Call:
        length = torch.tensor(here.steering.bound.lengths(here.call.q.shape[0]), device=here.call.q.device)
        if bool((here.row_position == length[:, None] - 1).any()):
            chosen = self.kept(here, length)
            here.note(Kept(chosen, self.remember(here, chosen)))
        noted = here.recall()
        after = here.row_position >= length[:, None]
        if noted is None or not bool(after.any()):
            return here.call
        kept = noted.kept
        position = here.key_position
        inside = (position >= 0) & (position < length[:, None])
        place = position.clamp(0, kept.shape[-1] - 1)[:, None].expand(-1, kept.shape[1], -1)
        dropped = ~kept.gather(2, place) & inside[:, None]
        each = here.call.sizes[1] // here.call.sizes[2]
        coefficient = torch.where(after, -math.inf, 0.0)[:, None].expand(-1, here.call.sizes[1], -1)
        return here.weighed(coefficient, dropped.repeat_interleave(each, 1))

    def kept(self, here: Here, length: Tensor) -> Bool[Tensor, "b g n"]:
        """By position in the prompt, for the layer at hand."""
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
        return chosen.gather(2, place) & there[:, None]


def _rest(share: float, whole: Bool[Tensor, "l g"], layout: HeadLayout) -> float:
    """The share of the kv heads that do not keep everything, so that all together keep `share`."""
    fixed = float(whole.float().mean())
    if fixed >= share and fixed < 1:
        raise UsageError(
            f"share={share} of the keys is kept, but {int(whole.sum())} of {whole.numel()} kv heads keep everything, "
            f"which is {fixed:.2f}: give a larger share, or fewer full heads."
        )
    return 1.0 if fixed == 1 else (share - fixed) / (1 - fixed)


def full_heads(scores: HeadScores, share: float, part: float) -> HeadSet:
    """The kv heads with the best query heads, as many as `part` of the budget lets keep everything; all of their heads.

    Raises UsageError for a part that is not in [0, 1). Source: ours, after DuoAttention's quantile.
    Cannot show: whether a head needs all of its keys; scores only rank.
    """
    if not 0 <= part < 1:
        raise UsageError(f"part={part} is not in [0, 1): it is the part of the budget that goes to whole heads.")
    layout = scores.layout
    best = scores.values.nan_to_num(-math.inf).unflatten(1, (layout.kv_heads, -1)).amax(-1)
    count = int(part * share * best.numel())
    order = best.flatten().argsort(descending=True, stable=True)[:count].tolist()
    each = layout.heads // layout.kv_heads
    named = [(i // layout.kv_heads, each * (i % layout.kv_heads) + j) for i in order for j in range(each)]
    return HeadSet.parse(named) if named else HeadSet()


def relative(weights: Float[Tensor, "l g"], share: float) -> Float[Tensor, "l g"]:
    """Shares in proportion to weights, none above 1, whose mean is `share`."""
    weights = weights.double().clamp(min=1e-9)
    low, high = 0.0, float(1 / weights.min())
    # the mean grows with the factor: halving finds it
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((weights * middle).clamp(max=1).mean()) < share else (low, middle)
    return (weights * high).clamp(max=1).float()


def grouped(values: Float[Tensor, "b h k"], groups: int) -> Float[Tensor, "b g k"]:
    """The mean over the query heads of each kv head."""
    return values.unflatten(1, (groups, -1)).mean(2)


@contextlib.contextmanager
def selecting(
    model: nn.Module,
    selector: KeySelector,
    prompts: Prompts,
    cache: Any = None,
    *,
    noted: dict[tuple[int, int], Kept] | None = None,
) -> Iterator[Steering]:
    """Let tokens after the prompt see only the keys that a selector keeps, in forward() with a cache or generate().

        cache = CompactCache(model)
        with selecting(model, SnapKV(share=0.25), prompts, cache):
            model.generate(**prompts.tensors(), past_key_values=cache)

    cache: a CompactCache, which then holds no other keys, layer by layer as the prompt is read; without one the keys
    are hidden and the memory stays. Both give the same tokens. Source: ours.
    noted: what the selector chose before, of a prompt that is in the model's cache already.
    Raises as `steering`, and UsageError for a selector without prompts. Cannot show: speed; hidden keys are still
    multiplied, and a compact layer is laid out whole for the time of its call.
    """
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(steering(model, selector, prompts))
        state.memory |= noted or {}
        if cache is not None:
            lengths = torch.tensor(prompts.lengths)

            def compact(layer: int) -> Any:
                def after(*_: Any) -> None:
                    chosen = state.memory.get((0, layer))
                    held = cache.layers[layer]
                    if chosen is not None and getattr(held, "kept", 0) is None and not selector.idle:
                        held.compact(_columns(chosen.kept, lengths.to(chosen.kept.device)))

                return after

            for layer, module in attention_layers(model).items():
                handle = module.register_forward_hook(compact(layer))
                stack.callback(handle.remove)
        yield state


def _columns(kept: Bool[Tensor, "b g n"], length: Tensor) -> Bool[Tensor, "b g k"]:
    """From positions to the columns of a batch padded on the left."""
    n = kept.shape[-1]
    position = torch.arange(n, device=kept.device)[None] - (n - length)[:, None]
    place = position.clamp(min=0)[:, None].expand(-1, kept.shape[1], -1)
    return kept.gather(2, place) & (position >= 0)[:, None]
