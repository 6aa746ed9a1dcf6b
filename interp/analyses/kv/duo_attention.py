"""DuoAttention and RazorAttention: some kv heads keep everything, the others the first and the last keys."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.analyses.kv.shares import full_heads
from interp.analyses.kv.streaming import Streaming
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext
from interp.kernels.contract import Call


@dataclass(frozen=True)
class DuoAttention(Streaming):
    """The kv heads with the highest gates keep everything, the others the first keys and the last.

    `DuoAttention.of(identify.duo_gates(...), share)` gives whole heads `part` of the budget, streaming heads the rest.
    Source: Xiao et al. 2410.10819. Differs: the share of keys is asked for and `part` says how it is split, where the
    paper fixes the share of full heads; the prompt is read whole in all heads.
    Cannot show: which tasks the gates were not trained for.
    """

    @classmethod
    def of(cls, scores: HeadScores, share: float, part: float = 0.7, **settings: Any) -> "DuoAttention":
        """Full heads: the highest by `scores`."""
        return cls(share=share, full=str(full_heads(scores, share, part)), **settings)


@dataclass(frozen=True)
class RazorAttention(DuoAttention):
    """As DuoAttention, with the dropped keys of a head as one: their mean key and value, counted as often as they are.

    out = softmax over kept keys and k^, whose logit is q . k^ scale + log N, k^ and v^ the means of the N dropped keys
    and values, after RoPE. It stands in the place of the first key that was dropped. Give `of` scores of induction and
    echo heads. Source: 2407.15891. Differs: the budget is the share asked for, not max(4000, N / 5).
    Keys of the reply all stay. Raises UsageError in a forward that reads prompt and continuation at once: the mean is
    known after the prompt.
    Cannot show: anything of a head whose dropped keys point everywhere; their mean is then near nothing.
    """

    compensate: bool = True

    @property
    def rolls(self) -> bool:
        return False

    def remember(self, here: EditContext, kept: Bool[Tensor, "b g n"]) -> Any:
        """Where the mean of each kv head goes [b g], mean key and value [b g d], and how many keys it stands for."""
        if not self.compensate:
            return None
        call, site = here.call, here.site
        column = torch.arange(kept.shape[-1], device=kept.device) + site.first[:, None] - call.k_start
        length = here.length
        there = (torch.arange(kept.shape[-1], device=kept.device) < length[:, None]) & (column >= 0)
        dropped = (~kept & there[:, None]).float()
        count = dropped.sum(-1)
        place = column.clamp(0, call.k.shape[2] - 1)[:, None, :, None]
        means = [
            (dropped[..., None] * x.float().gather(2, place.expand(-1, x.shape[1], -1, x.shape[-1]))).sum(2)
            / count[..., None].clamp(min=1)
            for x in (call.k, call.v)
        ]
        return dropped.argmax(-1), *means, count

    def apply(self, here: EditContext) -> Call:
        call = super().apply(here)
        noted = here.recall()
        if not self.compensate or noted is None or call is here.call or noted.more is None:
            return call
        place, key, value, count = noted.more
        if bool((here.row_position < here.length[:, None]).any()):
            raise UsageError(
                "RazorAttention needs the prompt to be read before what follows it, with a cache: use generate(), or a "
                "forward for each."
            )
        b, heads, groups, _, keys = call.sizes
        at = place + here.site.first[:, None] - call.k_start
        some = (count > 0) & (at >= 0)
        slot = torch.nn.functional.one_hot(at.clamp(0, keys - 1), keys).bool() & some[..., None]
        k, v = (
            torch.where(slot[..., None], mean[:, :, None].to(x.dtype), x)
            for mean, x in ((key, call.k), (value, call.v))
        )
        # the slot is seen again, as often as the keys that it stands for
        each = heads // groups
        shown = slot.repeat_interleave(each, 1)
        group = call.group_of_key.expand(b, heads, -1).masked_fill(shown, 0)
        weight = torch.log(count.clamp(min=1)).repeat_interleave(each, 1)[..., None]
        bias = torch.zeros(b, heads, keys, device=k.device) if call.key_bias is None else call.key_bias
        return replace(call, k=k, v=v, key_group=group, key_bias=bias + torch.where(shown, weight, 0.0))
