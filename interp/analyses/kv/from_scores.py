"""Which selector is made of which scores."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.kv.compress_kv import CompressKV
from interp.analyses.kv.curve import CONTROL
from interp.analyses.kv.duo_attention import DuoAttention, RazorAttention
from interp.analyses.kv.evaluate import Make
from interp.analyses.kv.head_budgets import HeadKV, TaskKV
from interp.analyses.kv.selector import KeySelector
from interp.analyses.kv.shares import unwindowed
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import RandomKeys, Streaming
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError
from interp.hooks.model.layers import unwrap

PLAIN: dict[str, Make] = {"StreamingLLM": Streaming, "SnapKV": SnapKV, "Task-KV": TaskKV}
"""selectors that take no scores"""
OF_SCORES: dict[str, tuple[Callable[..., KeySelector], tuple[str, ...]]] = {
    "CompressKV": (CompressKV.of, ("semantic_retrieval",)),
    "HeadKV-R2": (HeadKV.of, ("retrieval_reasoning",)),
    "HeadKV-R": (HeadKV.of, ("retrieval",)),
    "DuoAttention": (DuoAttention.of, ("duo_gates",)),
    "RazorAttention": (RazorAttention.of, ("razor_induction", "razor_echo")),
}
"""selectors that take scores, each with the names of those; HeadKV by retrieval where reasoning is not measured"""
INDUCTION = 14
"""kv heads by induction to each one by echo: RazorAttention's 14 % and 1 %"""


def selectors_of(scores: Mapping[str, HeadScores], seed: int = 0, model: nn.Module | None = None) -> dict[str, Make]:
    """Every selector that these scores make, as a function of the share, by the name that its paper gives it.

    "random" (drawn by `seed`), StreamingLLM, SnapKV and Task-KV always; CompressKV by semantic, HeadKV-R2 by reasoning,
    else HeadKV-R by retrieval, DuoAttention by duo_gates, RazorAttention by razor_induction and razor_echo in one
    ranking (`razor_ranking`). Tables of which no prompt counts are passed over. With `model`, scores of its layers with
    a window are left out (`selectable`): heads chosen there would use up a budget that is of the other layers.
    Source: ours. Cannot show: other scores or settings under which a selector would do better.
    """
    tables = scores if model is None else {name: selectable(table, model) for name, table in scores.items()}
    counted = {name: table for name, table in tables.items() if table.counted}
    made: dict[str, Make] = {CONTROL: partial(RandomKeys, seed=seed), **PLAIN}
    for name in makeable(counted):
        make, names = OF_SCORES[name]
        of = [counted[each] for each in names]
        made[name] = partial(make, of[0] if len(of) == 1 else razor_ranking(*of))
    return made


def makeable(names: Iterable[str]) -> list[str]:
    """Those of OF_SCORES that scores of these names make."""
    given = set(names)
    found = [name for name, (_, needed) in OF_SCORES.items() if given.issuperset(needed)]
    return [name for name in found if name != "HeadKV-R" or "HeadKV-R2" not in found]


def razor_ranking(induction: HeadScores, echo: HeadScores) -> HeadScores:
    """Induction and echo heads in one ranking of kv heads, in the shares of RazorAttention.

    score[l h] = -min(i / 14, e), i and e the places, from 1, of the kv head of h by its best score of each kind: a
    prefix of the ranking has 14 heads by induction for each one by echo. Raises ScoreError for tables of two models.
    Source: RazorAttention, Tang et al. 2407.15891. Differs: a ranking, so that any budget can be met, where the paper
    takes 14 % and 1 %. Cannot show: whether these shares suit other models than the paper's.
    """
    if induction.layout != echo.layout:
        raise ScoreError(f"induction is of {induction.layout}, echo of {echo.layout}: give scores of one model.")
    place = torch.minimum(_places(induction) / INDUCTION, _places(echo))
    each = induction.n_heads // place.shape[1]
    place = place.masked_fill((induction.by_group() == -torch.inf) & (echo.by_group() == -torch.inf), torch.nan)
    return HeadScores("razor", -place.repeat_interleave(each, 1)[None], kv_heads=place.shape[1])


def selective(model: nn.Module) -> bool:
    """Whether any layer has no window of its own, so that a selector has keys to choose from."""
    network: Any = unwrap(model)
    return bool(unwindowed(network, 1).any())


def selectable(scores: HeadScores, model: nn.Module) -> HeadScores:
    """The scores of layers without a window of their own, in which alone a selector chooses; the others have none."""
    network: Any = unwrap(model)
    kept = unwindowed(network, scores.layers)
    return replace(scores, per_prompt=scores.per_prompt.masked_fill(~kept[None, :, None], torch.nan))


def _places(scores: HeadScores) -> Tensor:
    """[l g], 1 for the kv head with the best query head."""
    best = scores.by_group()
    return best.flatten().argsort(descending=True, stable=True).argsort().view_as(best).float() + 1
