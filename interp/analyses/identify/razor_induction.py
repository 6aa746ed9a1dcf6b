"""RazorAttention's induction heads: heads that attend to the tokens after all earlier copies of a token."""

from functools import partial

import torch
from torch import nn

from interp.analyses import costs
from interp.analyses.identify._razor import check_copies, razor
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import ScoreError, UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep as keeps

__all__ = ["razor_induction", "razor_protected"]


@analysis(
    title="Razor induction",
    group="long context",
    order=6,
    sets=("long",),
    prompts=standard.repeated(copies=4),
    check=partial(check_copies, name="razor_induction"),
    cost=costs.reading(keeps.at(-1)),
    source_settings={"rope": "true in the paper, false in the tool", "n_repeated": 2500},
)
def razor_induction(
    model: nn.Module,
    prompts: Prompts,
    *,
    rope: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its attention on the tokens after all earlier copies of the current token.

    `score[n l h] = mean over pairs (q, d) of pattern[n l h q q-dK+1]`, with q in copy c = 2, 3, ... of K tokens and
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
        >>> interp.identify.razor_induction(model, copies).per_prompt.shape
        torch.Size([2, 2, 4])

    Source:
        RazorAttention, Tang et al. 2407.15891, induction heads.

    Differs:
        K is as given; the paper uses 2500. The vendor's tool computes what `rope=False` does, from projections before
        any norm of q and k; here it is after that norm.

    Limits:
        Does not show that the head carries anything over a distance in text that does not repeat.
    """
    return razor(model, prompts, "razor_induction", 1, rope, batch_size, seed, progress)


def razor_protected(
    induction: HeadScores,
    echo: HeadScores,
    layout: HeadLayout | None = None,
    *,
    share: tuple[float, float] = (0.14, 0.01),
) -> HeadSet:
    """Choose the heads whose whole cache RazorAttention keeps: the first by induction, and the first by echo.

    `group[l g] = max over the query heads h of kv head g of score[l h]`. Of all n kv heads of the model, round(share *
    n) are taken from each ranking, at least one, and ties go to the earlier head. Heads without a score are left
    out. All query heads of the others are returned.

    Args:
        induction: Scores of `razor_induction`.
        echo: Scores of `razor_echo`.
        layout: Layout of the model, where the scores do not know the kv heads, as in old files.
        share: Shares of induction and of echo heads.

    Returns:
        HeadSet: The query heads of all protected kv heads.

    Raises:
        ScoreError: If the tables differ in shape.
        UsageError: If a share is not between 0 and 1.

    Examples:
        >>> copies = interp.tasks.repeated(tokenizer, n=5, copies=4, batch=2)
        >>> induction = interp.identify.razor_induction(model, copies)
        >>> echo = interp.identify.razor_echo(model, copies)
        >>> len(interp.identify.razor_protected(induction, echo, share=(1.0, 0.0)))
        8

    Source:
        RazorAttention, Tang et al. 2407.15891: 14 % and 1 %.

    Differs:
        The vendor's tool compares values by membership, so that ties take more than the share, and its 1 % of few heads
        rounds to none.

    Limits:
        Does not show that the other heads can be cut; evaluate the model with a cut cache for that.
    """
    layout = layout or induction.layout
    for scores in (induction, echo):
        if (scores.layers, scores.n_heads) != (layout.layers, layout.heads):
            raise ScoreError(
                f"'{scores.name}' has {scores.layers}x{scores.n_heads} heads and the layout "
                f"{layout.layers}x{layout.heads}; give both scores of one model."
            )
    if not all(0 <= part <= 1 for part in share):
        raise UsageError(
            f"share={share} is out of range; give the shares of induction and echo heads, each between 0 and 1."
        )
    groups = HeadSet()
    for scores, part in zip((induction, echo), share, strict=True):
        best = scores.by_group(layout.kv_heads).flatten()
        count = max(1, round(part * len(best)))
        first = best.sort(descending=True, stable=True).indices[:count].tolist()
        # a layer whose window hides all copies has no score, and keeps no more than its window anyway
        groups |= HeadSet(tuple(Head(*divmod(i, layout.kv_heads)) for i in first if best[i] > -torch.inf))
    each = layout.heads // layout.kv_heads
    return HeadSet(tuple(Head(layer, group * each + i) for layer, group in groups for i in range(each)))
