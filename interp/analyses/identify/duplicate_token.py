"""Duplicate-token heads: heads that attend to earlier occurrences of the current token."""

from torch import nn

from interp.analyses.identify._targets import earlier, score_targets
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.prompts.prompts import Prompts


def duplicate_token(
    model: nn.Module,
    prompts: Prompts,
    *,
    by_value: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Attention on all earlier occurrences of the current token.

    score[n l h] = mean over q with an earlier equal id of sum over k < q with id[k] = id[q] of pattern[n l h q k].
    prompts: tasks.repeated, or any text. by_value weighs keys by their value's norm. extras["mul"]: TransformerLens'.
    Source: Wang et al. 2211.00593 (duplicate token heads). Differs: only queries that have a target are averaged.
    Cannot show: that the head reads identity rather than position, unless copies lie at several distances.
    """
    return score_targets(
        model,
        prompts,
        "duplicate_token",
        earlier,
        by_value=by_value,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
