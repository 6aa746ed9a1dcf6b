"""RazorAttention: DuoAttention whose dropped keys stay as one mean key."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.analyses.kv.duo_attention import DuoAttention
from interp.analyses.registry import selector
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError, UsageError
from interp.hooks.edit.edit import EditContext
from interp.kernels.contract import Call

INDUCTION_HEADS_PER_ECHO_HEAD = 14
"""kv heads by induction to each one by echo: the 14 % and 1 % of RazorAttention"""


def _from_two_tables(
    induction: HeadScores, echo: HeadScores, keep_ratio: float, *, part: float = 0.7, **settings: Any
) -> "RazorAttention":
    """A selector by induction and echo scores, see `razor_ranking`.

    Args:
        part: Part of the budget for heads with a full cache.
    """
    made: Any = RazorAttention.from_scores(razor_ranking(induction, echo), keep_ratio, part=part, **settings)
    return made


@selector(
    name="razor_attention",
    title="RazorAttention",
    order=7,
    needs=("razor_induction", "razor_echo"),
    from_scores=_from_two_tables,
)
@dataclass(frozen=True)
class RazorAttention(DuoAttention):
    """DuoAttention with the dropped keys of a head as one: their mean key and value, weighted by their number.

    `out = softmax over the kept keys and k^`, where the logit of k^ is `q . k^ scale + log N`, and k^ and v^ are the
    means of the N dropped keys and values, after RoPE. It takes the place of the first key that was dropped. All keys
    of the reply are kept.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: Number of first keys, which are part of `keep_ratio` and kept before all other keys.
        n_recent: Least number of last keys of the prompt that are kept.
        full_cache_heads: Heads whose kv heads keep everything; `from_scores` takes a ranking of induction and echo
            heads, such as `razor_ranking`.
        compensate: Add the mean key and value.

    Raises:
        UsageError: While the model runs, if prompt and continuation are read in one forward pass, since the mean is
            known only after the prompt.

    Source:
        2407.15891.

    Differs:
        The budget is the given share, not max(4000, N / 5).

    Limits:
        Does not help a head whose dropped keys point in all directions, since their mean is then close to zero.
    """

    compensate: bool = True

    @property
    def rolls(self) -> bool:
        return False

    def remember(self, here: EditContext, kept: Bool[Tensor, "b g n"]) -> Any:
        """Place of the mean of each kv head `[b g]`, mean key and value `[b g d]`, and number of dropped keys."""
        if not self.compensate:
            return None
        call, site = here.call, here.site
        place = torch.arange(kept.shape[-1], device=kept.device).expand(len(kept), -1)
        column = site.text.columns(place) - call.k_start
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
        if not self.compensate or noted is None or call is here.call or noted.extra is None:
            return call
        place, key, value, count = noted.extra
        row = here.row_position
        if bool(((row >= 0) & (row < here.length[:, None])).any()):
            raise UsageError(
                "RazorAttention needs the prompt to be read before its continuation, with a cache; use generate(), or "
                "one forward pass for each."
            )
        b, heads, groups, _, keys = call.sizes
        at = here.site.text.columns(place) - call.k_start
        some = (count > 0) & (at >= 0)
        slot = torch.nn.functional.one_hot(at.clamp(0, keys - 1), keys).bool() & some[..., None]
        k, v = (
            torch.where(slot[..., None], mean[:, :, None].to(x.dtype), x)
            for mean, x in ((key, call.k), (value, call.v))
        )
        # the place is visible again, weighted by the number of dropped keys
        each = heads // groups
        shown = slot.repeat_interleave(each, 1)
        group = call.group_of_key.expand(b, heads, -1).masked_fill(shown, 0)
        weight = torch.log(count.clamp(min=1)).repeat_interleave(each, 1)[..., None]
        bias = torch.zeros(b, heads, keys, device=k.device) if call.key_bias is None else call.key_bias
        return replace(call, k=k, v=v, key_group=group, key_bias=bias + torch.where(shown, weight, 0.0))


def razor_ranking(induction: HeadScores, echo: HeadScores) -> HeadScores:
    """Rank kv heads by induction and echo scores together, in the proportion of RazorAttention.

    `score[l h] = -min(i / 14, e)`, where i and e are the places, from 1, of the kv head of h by its best score of each
    kind. A prefix of the ranking has 14 heads by induction for each one by echo.

    Args:
        induction: Scores of `identify.razor_induction`.
        echo: Scores of `identify.razor_echo`.

    Returns:
        HeadScores: one score for all heads of a kv head; NaN where a kv head has neither score.

    Raises:
        ScoreError: For tables of two models.

    Examples:
        >>> from interp.analyses.kv import razor_ranking
        >>> razor_ranking(scores, scores).values.shape
        torch.Size([2, 4])

    Source:
        RazorAttention, Tang et al. 2407.15891.

    Differs:
        It is a ranking, so that any budget can be met, where the paper uses 14 % and 1 % of the heads.

    Limits:
        Does not show that these proportions suit models other than those of the paper.
    """
    if induction.layout != echo.layout:
        raise ScoreError(f"induction is of {induction.layout}, echo of {echo.layout}; give scores of one model.")
    place = torch.minimum(_places(induction) / INDUCTION_HEADS_PER_ECHO_HEAD, _places(echo))
    each = induction.n_heads // place.shape[1]
    place = place.masked_fill((induction.by_group() == -torch.inf) & (echo.by_group() == -torch.inf), torch.nan)
    return HeadScores("razor", -place.repeat_interleave(each, 1)[None], kv_heads=place.shape[1])


def _places(scores: HeadScores) -> Tensor:
    """Places `[l g]`, 1 for the kv head with the best query head."""
    best = scores.by_group()
    return best.flatten().argsort(descending=True, stable=True).argsort().view_as(best).float() + 1
