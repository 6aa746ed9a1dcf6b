"""The heads that keep every key, by their scores."""

import torch

from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.model.heads import HeadSet


def full_cache_heads(scores: HeadScores, keep_ratio: float, part: float) -> HeadSet:
    """The kv heads with the best query heads, as many as a part of the budget allows to keep everything.

    A kv head without a score is not chosen, and a layer without scores adds nothing to the budget.

    Args:
        scores: Scores of query heads; a kv head counts by its best query head.
        keep_ratio: Share of the keys that the model keeps.
        part: Part of this budget for heads with a full cache, in [0, 1).

    Returns:
        HeadSet: all query heads of the chosen kv heads.

    Raises:
        UsageError: If `part` is out of range.

    Examples:
        >>> from interp.analyses.kv import full_cache_heads
        >>> len(full_cache_heads(scores, keep_ratio=0.7, part=0.8))
        4

    Source:
        This package, after DuoAttention's quantile.

    Limits:
        Does not show that a head needs all of its keys, since scores only rank heads.
    """
    if not 0 <= part < 1:
        raise UsageError(f"part={part} is not in [0, 1); give the part of the budget for heads with a full cache.")
    layout = scores.layout
    best = scores.by_group()
    # no keys are chosen in a layer without scores
    count = int(part * keep_ratio * int((best > -torch.inf).any(1).sum()) * layout.kv_heads)
    order = best.flatten().argsort(descending=True, stable=True)[:count].tolist()
    order = [i for i in order if best.flatten()[i] > -torch.inf]
    each = layout.heads // layout.kv_heads
    named = [(i // layout.kv_heads, each * (i % layout.kv_heads) + j) for i in order for j in range(each)]
    return HeadSet.parse(named) if named else HeadSet()
