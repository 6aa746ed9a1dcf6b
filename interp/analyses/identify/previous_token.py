"""Previous-token heads: heads that attend to the token right before the current one."""

from torch import nn

from interp.analyses import costs
from interp.analyses.causal import controls
from interp.analyses.identify._targets import Targets, score_targets
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read import keep as keeps


@analysis(
    title="Previous token",
    group="copying",
    order=3,
    sets=("basic",),
    color="#009e73",
    threshold=0.3,
    prompts=standard.passages,
    control=controls.loss(span="second", n_tokens=300),
    cost=costs.reading(keeps.at(-1), keeps.at(-1, by_value=True)),
)
def previous_token(
    model: nn.Module,
    prompts: Prompts,
    *,
    by_value: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its attention to the token right before the current one.

    `score[n l h] = mean over q >= 1 of pattern[n l h q q-1]`. The first token of a prompt is left out.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Any prompts, such as `tasks.passages`.
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
        PromptError: If a prompt has fewer than two tokens.

    Examples:
        >>> scores = interp.identify.previous_token(model, prompts)
        >>> scores.per_prompt.shape
        torch.Size([2, 2, 4])

    Source:
        Olsson et al. 2022; the head detector of TransformerLens.

    Limits:
        Does not show what the head moves. A head may attend to the previous token by default and write nothing.
    """
    return score_targets(
        model,
        prompts,
        "previous_token",
        _before,
        by_value=by_value,
        both=True,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )


def _before(prompt: Prompt) -> Targets:
    return [[q - 1] if q else [] for q in range(len(prompt))]
