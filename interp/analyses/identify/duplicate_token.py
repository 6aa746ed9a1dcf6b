"""Duplicate-token heads: heads that attend to earlier occurrences of the current token."""

from functools import partial

from torch import nn

from interp.analyses import costs
from interp.analyses.causal import controls
from interp.analyses.identify._targets import check_targets, earlier, score_targets
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep as keeps


@analysis(
    title="Duplicate token",
    group="copying",
    order=4,
    sets=("basic",),
    color="#cc79a7",
    threshold=0.3,
    prompts=standard.repeated(),
    check=partial(check_targets, name="duplicate_token", targets=earlier),
    control=controls.loss(span="second", n_tokens=300),
    cost=costs.reading(keeps.at(-1), keeps.at(-1, by_value=True)),
)
def duplicate_token(
    model: nn.Module,
    prompts: Prompts,
    *,
    by_value: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its attention on all earlier occurrences of the current token.

    `score[n l h] = mean over q with an earlier equal id of sum over k < q with id[k] = id[q] of pattern[n l h q k]`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with repeated tokens, such as `tasks.repeated`, or any text.
        by_value: Weight each key by the norm of its value vector.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in shares of attention (0 to 1); NaN where the window of a layer hides
            every target of a prompt. The extra "mul" [n l h] divides by the number of all queries, which is
            TransformerLens' "mul" measure. The extra "by_value" [n l h] is the score with each key weighted by the
            norm of its value vector.

    Raises:
        PromptError: If a prompt repeats no token.

    Examples:
        >>> scores = interp.identify.duplicate_token(model, prompts)
        >>> scores.per_prompt.shape
        torch.Size([2, 2, 4])

    Source:
        Wang et al. 2211.00593, duplicate token heads.

    Differs:
        Averages only over the tokens that occurred before in the prompt.

    Limits:
        Does not show that the head reads the token's identity rather than its position, unless the copies lie at
        several distances.
    """
    return score_targets(
        model,
        prompts,
        "duplicate_token",
        earlier,
        by_value=by_value,
        both=True,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
