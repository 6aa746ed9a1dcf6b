"""Previous-token heads: heads that attend to the token right before."""

from torch import nn

from interp.analyses.identify._targets import Targets, score_targets
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.prompts.prompts import Prompt, Prompts


def previous_token(
    model: nn.Module,
    prompts: Prompts,
    *,
    by_value: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Attention on the token right before.

    score[n l h] = mean over q >= 1 of pattern[n l h q q-1].
    prompts: any; the first real token is left out. by_value weighs keys by their value's norm. extras["mul"]:
    TransformerLens' measure. Source: Olsson et al. 2022; TransformerLens' head detector.
    Cannot show: what the head moves; a head may attend there by default and write nothing.
    """
    return score_targets(
        model,
        prompts,
        "previous_token",
        _before,
        by_value=by_value,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )


def _before(prompt: Prompt) -> Targets:
    return [[q - 1] if q else [] for q in range(len(prompt))]
