"""Ships: how far the distribution of the next token moves when a head is ablated."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from interp.analyses import costs
from interp.analyses.causal.sweep import kl, sweep
from interp.analyses.measures.refusals import REPLY_TOKENS, refused_numbers
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks.refused import refused
from interp.analyses.tasks.task import Judge
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
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
    in_all=False,
    source_settings={"ablation": "uniform"},
)
def ships(
    model: nn.Module,
    prompts: Prompts,
    *,
    ablation: Ablation = "uniform",
    judge: Judge | None = refused,
    max_new_tokens: int = REPLY_TOKENS,
    heads: Any = None,
    batch_size: int = 8,
    rows: int | None = None,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> HeadScores:
    """Score each head by the divergence of the next token when the head is ablated (safety head importance score).

    `ships[n l h] = KL(P || P') = sum over v of P log(P / P')` in nats, over the next token after prompt n, where P is
    the unmodified model and P' the model with head h of layer l ablated. It is computed in float64.

    Only requests count that the unmodified model refuses; the scores of others are NaN. Where it refuses none, no head
    has a score.

    Load the model in float32: for a model of 1.5B parameters in 16 bits, the error of the divergence was as large as
    the score of the head with rank ten.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Requests, see `tasks.refusal`.
        ablation: "uniform" makes the attention exactly flat; it stands for the paper's "undifferentiated attention",
            which multiplies the query of the head by 1e-4. "zero" sets the output of the head to 0; it stands for the
            paper's "scaling contribution", which multiplies the output by 1e-4.
        judge: Function of a reply and its prompt that returns whether it refuses. None counts all requests
            without a check; use it for requests that the model is known to refuse.
        max_new_tokens: Number of new tokens of a reply that is judged.
        heads: Anything that `HeadSet.parse` takes, by default all heads; others are NaN.
        batch_size: Number of prompts in a batch. Every forward pass holds all prompts of a batch, for one or more
            heads.
        rows: Largest number of sequences per forward pass, where each sequence is one prompt with one head ablated, but
            never fewer than the prompts of a batch; by default as many as fit into free memory.
        seed: Seed of the confidence intervals over prompts.
        folder: Where finished pieces are kept, so that an interrupted analysis continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in nats, NaN for a request that is not refused.

    Raises:
        UsageError: If there are no heads, or the prompts have no tokenizer and there is a judge.
        PromptError: If there are no prompts, or a prompt is longer than the context.

    Examples:
        >>> interp.identify.ships(model, prompts, heads="L0H1, L1H2").name
        'ships:uniform'

    Source:
        Zhou et al., On the Role of Attention Heads in LLM Safety (ICLR 2025), section 3.

    Differs:
        With grouped-query attention, heads are still query heads, and each is paired with the key head of its group.
        The released code uses the number of the query head to index the key heads. There is no 1e-12 under the
        logarithm.

    Limits:
        Does not show that the head makes the model refuse: the next token may change while the model still refuses.
        Test heads with an ablation curve (`causal_curve`).
    """
    layout, name = HeadLayout.of(model), f"ships:{ablation}"
    size: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    counted = refused_numbers(model, prompts, judge, max_new_tokens=max_new_tokens, **size)
    table = HeadScores(
        name=name,
        per_prompt=torch.full((len(prompts), layout.layers, layout.heads), torch.nan),
        unit="nats",
        kv_heads=layout.kv_heads,
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", number)) for number, prompt in enumerate(prompts)),
    )
    if not counted:
        return table
    asked = replace(prompts, items=tuple(prompts[number] for number in counted))
    found = sweep(model, asked, ablation, kl, heads=heads, name=name, rows=rows, seed=seed, folder=folder, **size)
    per_prompt = table.per_prompt.index_copy(0, torch.tensor(counted), found.per_prompt)
    return replace(found, per_prompt=per_prompt, labels=table.labels)
