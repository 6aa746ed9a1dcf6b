"""Sink heads: heads whose attention rests on the first token, and other keys that receive it unasked."""

import torch
from torch import nn

from interp.analyses.results.head_scores import HeadScores
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import attention_layers
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import columns, mass

SHOWN = 32
"""positions of the map that is kept"""


def sinks(
    model: nn.Module,
    prompts: Prompts,
    *,
    threshold: float = 0.3,
    column_threshold: float = 0.1,
    by_value: bool = False,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Sink score: mean attention that the first real token receives from the queries that see it, itself included.

    alpha[n l h k] = mean over q >= k of pattern[n l h q k]; score = alpha at k = 0, a head is a sink above `threshold`.
    extras, per prompt: "sink" 1[alpha_0 > threshold], whose mean over everything is the paper's Sink_1(threshold);
    "positions" alpha of the first 32 positions; "columns" how many keys have alpha > column_threshold (ACT's sinks,
    the first included); "learned" mass of a learned sink (gpt-oss), 0 without one. by_value: alpha over p |v| / sum p
    |v|, small where the first token is attended to and says nothing. alpha falls with the length T, which the labels
    state: compare at equal T. Source: Gu et al. 2410.10781 (metric, eps 0.3, T 64); Yu et al. 2406.15765 (columns;
    the code's constant, not the paper's multiple of 1/N). Differs: the first *real* token, never column 0 of a padded
    batch. Cannot show: that the head is idle; it may rest on the first token and still write.
    """
    learned = any(getattr(module, "sinks", None) is not None for module in attention_layers(model).values())
    mean, found = columns("mean", by_value=by_value), {"positions": [], "columns": [], "learned": []}
    everything = mass((0, 1 << 30))
    for _, cap in read(
        model,
        prompts,
        [mean, everything] if learned else [mean],
        batch_size=batch_size,
        progress="sinks" if progress else None,
    ):
        alpha = cap[mean]
        shown = torch.nn.functional.pad(alpha[..., :SHOWN], (0, max(0, SHOWN - alpha.shape[-1])), value=torch.nan)
        found["positions"].append(shown)
        found["columns"].append((alpha > column_threshold).sum(-1).float())
        found["learned"].append(1 - cap[everything][..., 0].nanmean(-1) if learned else torch.zeros(alpha.shape[:3]))
    extras = {name: torch.cat(parts) for name, parts in found.items()}
    score = extras["positions"][..., 0]
    return HeadScores(
        name="sinks",
        per_prompt=score,
        unit="share of attention",
        kv_heads=HeadLayout.of(model).kv_heads,
        threshold=threshold,
        settings={"column_threshold": column_threshold, "by_value": by_value},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras=extras | {"sink": (score > threshold).float()},
        seed=seed,
        labels=tuple(f"T={length}" for length in prompts.lengths),
    )
