"""Induction heads: heads that attend to the token after an earlier occurrence of the current token."""

from functools import partial

from torch import nn

from interp.analyses import costs
from interp.analyses.causal import controls
from interp.analyses.identify._targets import after_earlier, check_targets, score_targets
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep as keeps


@analysis(
    title="Induction",
    group="copying",
    order=2,
    sets=("basic",),
    color="#3b82c4",
    threshold=0.3,
    prompts=standard.repeated(),
    check=partial(check_targets, name="induction", targets=after_earlier),
    control=controls.loss(span="second", n_tokens=300),
    cost=costs.reading(keeps.at(-1), keeps.at(-1, by_value=True)),
)
def induction(
    model: nn.Module,
    prompts: Prompts,
    *,
    by_value: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by prefix matching: attention to the token after the previous occurrence of the current token.

    `score[n l h] = mean over q in the second copy of pattern[n l h q q-s+1]`, where s is the distance between the
    copies. A perfect induction head scores 1.

    On text without marked copies, the mean is over the queries whose token occurred before, and the key is the one
    after the latest occurrence.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with repeated tokens, such as `tasks.repeated`.
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
        >>> scores = interp.identify.induction(model, prompts)
        >>> scores.per_prompt.shape
        torch.Size([2, 2, 4])

    Source:
        Olsson et al. 2022, "prefix matching".

    Differs:
        In a prompt whose repeated part is known, such as a sequence and its copy, the attended token has to be the one
        that follows the corresponding position of the original sequence, even where the current token occurs elsewhere
        too. In other prompts it is the one that follows the most recent earlier occurrence of the current token.

    Limits:
        Does not show that the head copies the token; examine its OV circuit for that. Does not show that the model
        needs the head; an ablation test shows that.
    """
    return score_targets(
        model,
        prompts,
        "induction",
        after_earlier,
        by_value=by_value,
        both=True,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
