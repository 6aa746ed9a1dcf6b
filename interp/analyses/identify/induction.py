"""Induction heads: heads that attend to the token after an earlier occurrence of the current one."""

from torch import nn

from interp.analyses.identify._targets import Targets, earlier, score_targets
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.prompts.prompts import Prompt, Prompts


def induction(
    model: nn.Module,
    prompts: Prompts,
    *,
    by_value: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Prefix matching: attention on the token after the previous occurrence of the current token.

    score[n l h] = mean over q in the second copy of pattern[n l h q q-s+1], s the distance of the copies; 1 for a
    perfect head. On other text: mean over the queries whose token occurred before, at the key after its latest
    occurrence. prompts: tasks.repeated. by_value weighs keys by their value's norm. extras["mul"]: TransformerLens'
    measure. Source: Olsson et al. 2022, prefix matching. Differs: one repetition as given, the latest earlier
    occurrence only. Cannot show: that the head copies (see its OV circuit), nor that it matters.
    """
    return score_targets(
        model, prompts, "induction", after, by_value=by_value, batch_size=batch_size, seed=seed, progress=progress
    )


def after(prompt: Prompt) -> Targets:
    # the token right before would be its own target when a token comes twice in a row
    return [[keys[-1] + 1] if keys and keys[-1] + 1 < q else [] for q, keys in enumerate(earlier(prompt))]
