"""Replies that ended at the limit of new tokens: how results count them, and the sentence that states it.

Such a reply may have been cut before its answer, which then counts as wrong.
"""

from collections import Counter
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
    """How many replies ended at the limit, and how many of them are wrong under each condition; "" without replies.

    Args:
        trials: The trials.
        settings: Settings of the experiment.
    """
    n, ended = 0, 0
    wrong, replies = Counter[str](), Counter[str]()
    for trial in trials:
        if AT_LIMIT in trial.facts:
            n += len(trial.replies)
            ended += round(len(trial.replies) * trial.facts[AT_LIMIT])
            wrong[trial.condition] += round(len(trial.replies) * trial.facts[WRONG_AT_LIMIT])
            replies[trial.condition] += len(trial.replies)
    if not n:
        return ""
    limit = settings.get("max_new_tokens")
    if not ended:
        return f"None of {n} replies was cut at {limit} new tokens."
    cut = f"{ended} of {n} replies {'was' if ended == 1 else 'were'} cut at {limit} new tokens"
    parts = [f"{condition} {count} of {replies[condition]}" for condition, count in wrong.items() if count]
    if not parts:
        return f"{cut}, and none of these is counted as wrong."
    counted = wrong.total()
    are, were = ("is", "was") if counted == 1 else ("are", "were")
    if counted < ended:
        counts = f"{cut}. {counted} of these {were} not right by then and {are} counted as wrong"
    else:
        not_right = "it was not right" if counted == 1 else "none was right"
        counts = f"{cut} and {are} counted as wrong: {not_right} by then"
    return f"{counts}, although a right answer might have followed. By condition: {', '.join(parts)}."
