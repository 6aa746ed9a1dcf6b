"""Sink heads: heads whose attention stays on the first token, and other keys that receive attention by default."""

from typing import Literal, get_args

import torch
from torch import nn

from interp.analyses import costs
from interp.analyses.causal import controls
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import attention_layers
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep as keeps
from interp.hooks.read.capture import read
from interp.hooks.read.keep import columns, mass

N_POSITIONS = 32
"""number of positions whose received attention is kept"""
Rows = Literal["all", "visible"]


@analysis(
    title="Sinks",
    group="attention patterns",
    order=5,
    sets=("basic",),
    color="#d3bd5c",
    role_order=1.0,
    prompts=standard.passages,
    control=controls.loss(span="second", n_tokens=300),
    cost=costs.reading(keeps.columns("sum"), keeps.columns("sum", by_value=True)),
    source_settings={
        "rows": "all",
        "threshold": 0.3,
        "column_threshold": 0.1,
        "by_value": False,
        "n_texts": 100,
        "text_length": 64,
    },
)
def sinks(
    model: nn.Module,
    prompts: Prompts,
    *,
    rows: Rows = "all",
    threshold: float = 0.3,
    column_threshold: float = 0.1,
    by_value: bool = False,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by the mean attention that the first token (of the prompt, not of the padding) receives.

    `alpha[n l h k] = 1 / (T - k) * sum over q >= k of pattern[n l h q k]`, where T is the number of tokens: the mean
    over the queries at positions k, k + 1, ..., T - 1. The score is alpha at k = 0. A head above `threshold` is called
    a sink head.

    In a layer with a window, queries farther from key k than the window give 0. With `rows="visible"` the mean is only
    over the queries that can see key k, and the result is named sinks_visible. Example: with a window of 16, only 16 of
    64 queries can see the first token. Without windows both are equal.

    alpha is smaller on longer prompts, so compare scores only at equal T. `scores.labels` gives T for each prompt.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Any prompts, such as `tasks.passages`.
        rows: "all" takes the mean over all queries at or after the key, as the paper does; "visible" only over those
            that can see the key.
        threshold: Score above which a head is called a sink head.
        column_threshold: A key counts as a sink of a head if its mean attention is above this value. The extra
            "columns" is the number of such keys.
        by_value: Replace `pattern[q k]` by `pattern[q k] |v_k| / (sum over j of pattern[q j] |v_j|)` before the mean.
            The score is then small if the first token has a small value vector.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in shares of attention. Extras for each prompt: "sink", 1 where alpha
            at k = 0 is above the threshold, whose mean over everything is the paper's Sink_1(threshold); "by_value",
            the score with attention weighted by value norms, which is always measured; "positions",
            alpha of the first 32 positions; "columns", the number of keys with alpha above `column_threshold` (the
            first token is counted if it is above; the edit `act` leaves it out and has its own threshold); "learned",
            the mass of a learned sink (gpt-oss), 0 without one.

    Raises:
        UsageError: If `rows` is unknown.

    Examples:
        >>> scores = interp.identify.sinks(model, prompts)
        >>> scores.extras["positions"].shape
        torch.Size([2, 2, 4, 32])

    Source:
        Gu et al. 2410.10781: the score and its threshold of 0.3, which the paper uses on texts of T = 64 tokens. Yu et
        al. 2406.15765: the number of keys that receive more than 0.1 (the constant of their code; their paper takes a
        multiple of 1/N, where N is the number of tokens).

    Differs:
        Uses the first token of the prompt, never column 0 of a padded batch. In models with sliding-window
        attention, which the paper does not study, a query whose window does not reach the first token counts as 0,
        unless `rows` is "visible".

    Limits:
        Does not show that the head is idle. It may attend to the first token and still write something.
    """
    if rows not in get_args(Rows):
        raise UsageError(
            f"unknown rows {rows!r}; choose from 'all' (queries at or after the key), 'visible' (those that see it)."
        )
    learned = any(getattr(module, "sinks", None) is not None for module in attention_layers(model).values())
    received, weighted = (columns("sum" if rows == "all" else "mean", by_value=by) for by in (by_value, True))
    found = {"positions": [], "columns": [], "by_value": [], "learned": []}
    everything = mass((0, 1 << 30))
    for batch, cap in read(
        model,
        prompts,
        [*dict.fromkeys((received, weighted)), *([everything] if learned else [])],
        batch_size=batch_size,
        progress="sinks" if progress else None,
    ):
        alpha, by_norm = cap[received], cap[weighted]
        if rows == "all":
            later = torch.tensor(batch.lengths)[:, None] - torch.arange(alpha.shape[-1])
            alpha, by_norm = (sums / later.clamp(min=1)[:, None, None] for sums in (alpha, by_norm))
        shown = torch.nn.functional.pad(
            alpha[..., :N_POSITIONS], (0, max(0, N_POSITIONS - alpha.shape[-1])), value=torch.nan
        )
        found["positions"].append(shown)
        found["by_value"].append(by_norm[..., 0])
        found["columns"].append((alpha > column_threshold).sum(-1).float())
        found["learned"].append(1 - cap[everything][..., 0].nanmean(-1) if learned else torch.zeros(alpha.shape[:3]))
    extras = {name: torch.cat(parts) for name, parts in found.items()}
    score = extras["positions"][..., 0]
    return HeadScores(
        name="sinks" if rows == "all" else "sinks_visible",
        per_prompt=score,
        unit="share of attention",
        kv_heads=HeadLayout.of(model).kv_heads,
        threshold=threshold,
        settings={"rows": rows, "column_threshold": column_threshold, "by_value": by_value},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras=extras | {"sink": (score > threshold).float()},
        seed=seed,
        labels=tuple(f"{length} tokens" for length in prompts.lengths),
    )
