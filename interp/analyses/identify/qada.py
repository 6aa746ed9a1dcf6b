"""QAdA: queries for which the first and last keys of a head are enough, found without reading the other keys."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from interp.analyses import costs
from interp.analyses.identify._locality import Broken, Settings, check_lengths, shares
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import ModelError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.attention_calls import AttentionCallTap, read_attention_calls
from interp.hooks.seam import ReadRequest, Site

SINK, WINDOW, REFRESH, MIN_KEYS = 16, 128, 64, 64
"""number of first keys, of last keys, of queries in a block, and of keys in the moments"""
TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@analysis(
    title="QAdA",
    group="long context",
    order=13,
    sets=("long",),
    prompts=standard.needles,
    check=partial(check_lengths, sink=SINK, window=WINDOW, refresh=REFRESH, min_keys=MIN_KEYS),
    cost=costs.reading(),
    source_settings={
        "sink": "16, unconfirmed",
        "window": "128 to 1,024, unconfirmed",
        "needle_length": "8k and 16k, unconfirmed",
    },
    shown_extras={"oracle": "By the true sum", "agreement": "Same label"},
)
def qada(
    model: nn.Module,
    prompts: Prompts,
    *,
    tau: float = 0.9,
    sink: int = SINK,
    window: int = WINDOW,
    refresh: int = REFRESH,
    min_keys: int = MIN_KEYS,
    taus: Sequence[float] = TAUS,
    broken: Broken = "clamp",
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by the share of queries whose first and last keys hold too little attention.

    `near = log sum of exp` over the first `sink` and the last `window` keys. The T other keys have the mean mu and the
    covariance Sigma, and their sum is estimated by `bulk ~ log T + m + v / 2` with `m = scale q . mu` and
    `v = scale^2 q Sigma q`.

    `score[n l h] = share of queries with near - bulk < log(tau / (1 - tau))`. A head above 0.5 is long in the static
    sense, which is one label for each head.

    Queries count where at least `min_keys` keys are in the moments. The moments are renewed every `refresh` queries,
    from the rotated keys of this prompt as they are in the cache. A layer whose own window is no wider than `window`
    has no far keys, and scores 0.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Long plain texts, such as `tasks.passages`.
        tau: Share of attention that is enough.
        sink: Number of first keys that are near.
        window: Number of last keys that are near.
        refresh: Number of queries after which the moments are renewed.
        min_keys: Number of keys in the moments from which on a query counts.
        taus: Shares at which the extras "sparsity" and "oracle_sparsity" are computed.
        broken: Treatment of queries whose estimate breaks, at v > log T. "clamp" uses the estimate up to v = 2 log T,
            and `m + sqrt(2 v log T)` from there on. "long" calls such queries long, which includes every head that is
            sharp, local or not.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in shares of queries. Extras for each prompt: "oracle", the same share
            by the true sum; "agreement" of the two labels; "missed", queries called local that are not; "log_error",
            the mean |estimate - bulk| where v <= log T; "broken", the share with v > log T; "sparsity" and
            "oracle_sparsity" [n l h t], the shares of local queries at each of `taus`.

    Raises:
        PromptError: If a prompt is too short for any query to count.
        ModelError: If a layer has a mask other than a causal one, with or without a window.
        UsageError: If a setting is out of range.

    Examples:
        >>> texts = interp.tasks.passages(tokenizer, n=2, length=60)
        >>> scores = interp.identify.qada(model, texts, sink=2, window=8, refresh=8, min_keys=8)
        >>> scores.per_prompt.shape
        torch.Size([2, 2, 4])

    Source:
        "Unveiling Simplicities of Attention", 2502.09647; no code is known.

    Differs:
        tau, sink and window are unconfirmed, so try several tau. A learned sink is in neither sum. A soft-cap is in the
        oracle and not in the estimate. The clamp is our addition, the largest of T normal draws.

    Limits:
        Does not show that a local query gives the same output without its far keys; a small share may carry what
        matters.
    """
    settings = Settings(tau, sink, window, refresh, min_keys, tuple(taus), broken)
    check_lengths(prompts, sink, window, refresh, min_keys)
    title = "qada" if progress else None
    extras = read_attention_calls(model, prompts, lambda: _Reader(settings), batch_size=batch_size, progress=title)
    return HeadScores(
        name="qada",
        per_prompt=extras.pop("long"),
        unit="share of queries",
        kv_heads=HeadLayout.of(model).kv_heads,
        threshold=0.5,
        settings={**vars(settings)},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras=extras,
        seed=seed,
        labels=tuple(f"T={length}" for length in prompts.lengths),
    )


@dataclass(eq=False)
class _Reader(AttentionCallTap):
    """Computes the shares of each layer as its attention call passes."""

    settings: Settings

    def want(self, site: Site) -> ReadRequest | None:
        if site.call.mask is not None:
            raise ModelError(
                f"layer {site.layer} has a mask that is not causal, so its far keys cannot be counted; use a model "
                "whose layers are causal, with or without a window."
            )
        with torch.no_grad():
            found = shares(replace(site.call, sinks=None), site.first, self.settings)
        self.found[site.layer] = {name: value.float().cpu() for name, value in found.items()}
        return None
