"""Replies that ended at the limit of new tokens: how results count them, and the sentence that states it.

Such a reply may have been cut before its answer, which then counts as wrong.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

AT_LIMIT = "at_limit"
"""extra of head scores, and fact of a trial: the share of its replies that ended at the limit"""
WRONG_AT_LIMIT = "wrong_at_limit"
"""fact of a trial: the share of its replies that ended at the limit and were judged wrong"""


def at_limit(ended: Sequence[bool], per_prompt: Tensor) -> Bool[Tensor, "n l h"]:
    """An extra of head scores: whether the reply to each prompt ended at the limit, the same for all heads.

    Args:
        ended: Whether each reply ended at the limit.
        per_prompt: The scores `[n l h]`.
    """
    return torch.tensor(list(ended))[:, None, None].expand(per_prompt.shape).clone()


def sentence_of_scores(extras: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """How many replies of head scores ended at the limit; "" where there were no replies.

    Args:
        extras: Extras of the scores.
        settings: Settings of the scores.
    """
    if AT_LIMIT not in extras:
        return ""
    ended = extras[AT_LIMIT].flatten(1).any(1)
    limit = settings.get("max_new_tokens")
    return f"{int(ended.sum())} of {len(ended)} replies ended at the limit of {limit} new tokens."


def sentence_of_trials(trials: Iterable[Any], settings: Mapping[str, Any]) -> str:
    """How many replies ended at the limit under each condition, and how many of them are wrong; "" without replies.

    Args:
        trials: The trials.
        settings: Settings of the experiment.
    """
    counts: dict[str, list[int]] = {}
    for trial in trials:
        if AT_LIMIT in trial.facts:
            n = len(trial.replies)
            sums = counts.setdefault(trial.condition, [0, 0, 0])
            sums[0] += n
            sums[1] += round(n * trial.facts[AT_LIMIT])
            sums[2] += round(n * trial.facts[WRONG_AT_LIMIT])
    if not counts:
        return ""
    parts = [
        f"{condition} {ended} of {n}" + (f" ({wrong} of them wrong)" if ended else "")
        for condition, (n, ended, wrong) in counts.items()
    ]
    return f"Replies that ended at the limit of {settings.get('max_new_tokens')} new tokens: {', '.join(parts)}."
