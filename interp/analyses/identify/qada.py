"""QAdA: for which queries the first and the last keys of a head are enough, told without touching the others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from interp.analyses.identify._locality import Broken, Settings, shares
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ModelError, PromptError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.attention_calls import AttentionCallTap, read_attention_calls
from interp.hooks.seam import ReadRequest, Site

SINK, WINDOW, REFRESH, LEAST = 16, 128, 64, 64
"""keys at the start, last keys, queries of a block, keys in the moments"""
TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def qada(
    model: nn.Module,
    prompts: Prompts,
    *,
    tau: float = 0.9,
    sink: int = SINK,
    window: int = WINDOW,
    refresh: int = REFRESH,
    least: int = LEAST,
    taus: Sequence[float] = TAUS,
    broken: Broken = "clamp",
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Long-context share: of how many queries a head's first and last keys hold too little, by the moments of the rest.

    near = log sum of exp over the first `sink` and last `window` keys; of the T other keys, whose mean is mu and whose
    covariance is Sigma, bulk ~ log T + m + v / 2 with m = scale q . mu, v = scale^2 q Sigma q.
    score[n l h] = share of queries with near - bulk < log(tau / (1 - tau)); above 0.5 a head is long in the static
    sense, one label a head. Queries that count have `least` keys in the moments, which are renewed every `refresh`
    queries, of rotated keys of this prompt, as they lie in the cache.
    broken: the estimate breaks at v > log T. "clamp" goes on with it to v = 2 log T, from there with
    m + sqrt(2 v log T); "long" calls such queries long, which takes in every head that is sharp, local or not.
    extras, per prompt: "oracle" the same share by the true bulk; "agreement" of the two labels; "missed" queries called
    local that are not; "log_error" mean |estimate - bulk| where v <= log T; "broken" share with v > log T; "sparsity"
    and "oracle_sparsity" [n l h t] share of local queries at each of `taus`. A layer whose own window is no wider than
    `window` has no bulk: 0. prompts: long plain texts, as tasks.passages.
    Raises PromptError for a prompt too short for any query to count, ModelError for masks other than causal ones with
    or without a window, UsageError for sizes without meaning.
    Source: "Unveiling Simplicities of Attention", 2502.09647; no code is known. Differs: tau, sink and window are
    unconfirmed, so sweep tau; a learned sink is in neither sum; a soft-cap is in the oracle and not in the estimate;
    the clamp is ours, the largest of T normal draws.
    Cannot show: that a local query gives the same output without its far keys; a small share may carry what matters.
    """
    settings = Settings(tau, sink, window, refresh, least, tuple(taus), broken)
    check_lengths(prompts, sink, window, refresh, least)
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


def check_lengths(
    prompts: Prompts, sink: int = SINK, window: int = WINDOW, refresh: int = REFRESH, least: int = LEAST
) -> None:
    """Raise PromptError for a prompt in which no query counts, wherever blocks of queries begin."""
    need = sink + window + least + refresh - 1
    for number, length in enumerate(prompts.lengths):
        if length < need:
            raise PromptError(
                f"prompt {number} has {length} tokens; {need} are needed before a query has {least} keys beyond the "
                f"first {sink} and the last {window}: give longer prompts, or a smaller window."
            )


@dataclass(eq=False)
class _Reader(AttentionCallTap):
    """Notes what the shares of a layer come to."""

    settings: Settings

    def want(self, site: Site) -> ReadRequest | None:
        if site.call.mask is not None:
            raise ModelError(
                f"layer {site.layer} has a mask of its own, of which T keys beyond a window cannot be told: qada reads "
                "causal layers, with or without a window."
            )
        with torch.no_grad():
            found = shares(replace(site.call, sinks=None), site.first, self.settings)
        self.found[site.layer] = {name: value.float().cpu() for name, value in found.items()}
        return None
