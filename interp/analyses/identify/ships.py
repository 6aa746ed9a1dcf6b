"""Ships: how far the distribution of the next token moves when a head is ablated."""

from typing import Any, Literal

from torch import nn

from interp.analyses import costs
from interp.analyses.causal.sweep import kl, sweep
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.prompts.prompts import Prompts

Ablation = Literal["uniform", "zero"]


@analysis(
    title="Ships",
    group="safety",
    order=40,
    joint=True,
    resumable=True,
    own_prompts=False,
    cost=costs.sweeping(),
    in_every=False,
)
def ships(
    model: nn.Module,
    prompts: Prompts,
    *,
    ablation: Ablation = "uniform",
    heads: Any = None,
    batch_size: int = 8,
    rows: int | None = None,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> HeadScores:
    """Score each head by the divergence of the next token when the head is ablated (safety head importance score).

    `ships[p l h] = KL(P || P') = sum over v of P log(P / P')` in nats, over the next token after prompt p, where P is
    the unmodified model and P' the model with head h of layer l ablated. It is computed in float64.

    In 16 bits the error of this divergence is as large as the tenth highest score of a model of 1.5B parameters, so
    load the model in float32.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Requests that the model refuses, see `tasks.refusal`.
        ablation: "uniform" for the undifferentiated attention of the paper (its query times 1e-4, here exactly flat
            attention), or "zero" for its scaling contribution (the output times 1e-4, here 0).
        heads: Anything that `HeadSet.parse` takes, by default all heads; others are NaN.
        batch_size: Number of prompts that are read together.
        rows: Rows of one forward pass, by default as many as fit into free memory.
        seed: Seed of the intervals.
        folder: Where finished pieces are kept, so that an interrupted analysis continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in nats.

    Raises:
        UsageError: If there are no heads.
        PromptError: If there are no prompts, or a prompt is longer than the context.

    Examples:
        >>> interp.identify.ships(model, prompts, heads="L0H1, L1H2").name
        'ships:uniform'

    Source:
        Zhou et al., On the Role of Attention Heads in LLM Safety (ICLR 2025), section 3.

    Differs:
        Heads are query heads, also with grouped queries, where the released code indexes keys by query head. There is
        no 1e-12 under the logarithm.

    Limits:
        Does not show that the head makes the model refuse: the next token may change without the verdict. Test heads
        with `causal_curve`.
    """
    return sweep(
        model,
        prompts,
        ablation,
        kl,
        heads=heads,
        name=f"ships:{ablation}",
        batch_size=batch_size,
        rows=rows,
        seed=seed,
        folder=folder,
        progress=progress,
    )
