"""Ships: how far a head's absence moves the next token of a query."""

from typing import Any, Literal

from torch import nn

from interp.analyses.causal.sweep import kl, sweep
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.prompts.prompts import Prompts

Ablation = Literal["uniform", "zero"]


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
    """Safety head importance score of each head on each query, by taking it out.

    ships[p l h] = KL(P as loaded || P with L l H h out) = sum over v of P log(P / P'), nats, over the next token after
    the prompt, in float64. ablation: "uniform", the paper's undifferentiated attention (its query times 1e-4, here
    exactly flat attention), or "zero", its scaling contribution (the output times 1e-4, here 0).
    prompts: queries that the model refuses; see tasks.refusal. Other arguments as in `sweep`; raises what it raises.
    In 16 bits the error of a KL is as large as the tenth score of a 1.5B model: load in float32.
    Source: Zhou et al., On the Role of Attention Heads in LLM Safety (ICLR 2025), section 3. Differs: heads are query
    heads under grouped queries too, where the released code indexes keys by query head; no 1e-12 under the logarithm.
    Cannot show: that the head makes the model refuse; the next token may change without the verdict. See causal_curve.
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
