"""RazorAttention's echo heads: heads that attend to all earlier copies of a token."""

from functools import partial

from torch import nn

from interp.analyses import costs
from interp.analyses.identify._razor import check_copies, razor
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep as keeps


@analysis(
    title="Razor echo",
    group="long context",
    order=7,
    sets=("long",),
    prompts=standard.repeated(copies=4),
    check=partial(check_copies, name="razor_echo"),
    cost=costs.reading(keeps.at(-1)),
    source_settings={"rope": "true in the paper, false in the tool", "n_repeated": 2500},
)
def razor_echo(
    model: nn.Module,
    prompts: Prompts,
    *,
    rope: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its attention on all earlier copies of the current token itself.

    `score[n l h] = mean over pairs (q, d) of pattern[n l h q q-dK]`, with q in copy c = 2, 3, ... of K tokens and
    d = 1 ... c-1. With four copies a perfect head scores 0.5, with two copies 1.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts that consist of copies of one text, such as `tasks.repeated(copies=4)`.
        rope: Read the attention of the model; False reads the softmax without the rotary embedding (`unrotated`).
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in shares of attention. A perfect head scores 1 with two copies and
            0.5 with four, since pairs are averaged, not summed over a query. NaN where the window of a layer hides
            all copies; a pair that it hides counts as 0.

    Raises:
        PromptError: If the spans of a prompt mark no copies.

    Examples:
        >>> copies = interp.tasks.repeated(tokenizer, n=5, copies=4, batch=2)
        >>> interp.identify.razor_echo(model, copies).per_prompt.shape
        torch.Size([2, 2, 4])

    Source:
        RazorAttention, Tang et al. 2407.15891, echo heads.

    Differs:
        As `razor_induction`.

    Limits:
        Does not show that the head reads the token's identity rather than a distance, since all copies lie K tokens
        apart.
    """
    return razor(model, prompts, "razor_echo", 0, rope, batch_size, seed, progress)
