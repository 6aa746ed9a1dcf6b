"""Positional heads: heads that look a fixed number of tokens back, whatever stands there."""

import inspect
import sys
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.analyses.identify._spread import spread
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import attention_layers, unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep as keeps
from interp.hooks.read.capture import read

FURTHEST = 8
"""tokens back"""
BAND = 8
"""fastest frequencies"""


def positional(
    model: nn.Module,
    prompts: Prompts,
    *,
    bands: int = BAND,
    batch_size: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Positional score: the attention that a head gives, on average, to the key a fixed number of tokens back.

    offsets[n l h delta] = mean over q >= delta of pattern[n l h q q-delta]; score[n l h] = max over delta in 0..8.
    extras: "offsets"; "delta", the best one; "std", the population std over q of pattern[n l h q q-delta] there, low
    for a head that does not look at content; "band", the share of the fastest of the frequencies m of RoPE,
    band = sum over m < bands of u / sum over m of u, with u[n l h m] = mean over positions of |q_m| |k_m|, the norms of
    the pair of dimensions that turns at m. NaN where a model or a layer does not rotate, as with learned positions.
    prompts: tasks.repeated(copies=1), random tokens, so that nothing but the place can be looked for; on text it is
    also the nearest words that are looked at. bands=0 spares the reading of q and k, which take memory.
    Raises UsageError for bands below 0.
    Source: Barbero et al. 2410.06205 (bands, diagonal heads). Differs: one score for offsets up to 8; std over
    queries; pairs are found by asking the model's own rotation, halves or neighbours; dimensions that it leaves alone
    are in no band.
    Cannot show: that a head needs its fast bands; a large u may be of pairs that cancel each other.
    """
    if bands < 0:
        raise UsageError(f"bands={bands}: give how many of the fastest frequencies to count, 0 for none.")
    rotated = pairs_of_dimensions(model) if bands else None
    keep = keeps.at(*range(0, -FURTHEST - 1, -1))
    streams = [] if rotated is None else [keeps.q(), keeps.k()]
    found = {"offsets": [], "delta": [], "std": [], "band": []}
    for _, cap in read(
        model, prompts, [keep, *streams], batch_size=batch_size, progress="positional" if progress else None
    ):
        back = cap[keep]
        early = torch.arange(back.shape[3])[:, None] < torch.arange(FURTHEST + 1)
        back = back.masked_fill(early, torch.nan)
        mean = back.nanmean(3)
        # a prompt of fewer tokens has no such offset
        delta = mean.nan_to_num(-1.0).argmax(-1)
        best = back.gather(-1, delta[:, :, :, None, None].expand(*back.shape[:4], 1))[..., 0]
        found["offsets"].append(mean)
        found["delta"].append(delta)
        found["std"].append(spread(best, 3))
        if rotated is None:
            found["band"].append(torch.full(delta.shape, torch.nan))
        else:
            found["band"].append(_band(cap[keeps.q()], cap[keeps.k()], rotated, bands))
    extras = {name: torch.cat(parts) for name, parts in found.items()}
    if unrotated := [at for at, module in attention_layers(model).items() if not getattr(module, "use_rope", True)]:
        extras["band"][:, unrotated] = torch.nan
    return HeadScores(
        name="positional",
        per_prompt=extras["offsets"].nan_to_num(-1.0).amax(-1),
        unit="share of attention",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"bands": bands},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras=extras,
        seed=seed,
        labels=tuple(f"{length} tokens" for length in prompts.lengths),
    )


def pairs_of_dimensions(model: Any) -> Int[Tensor, "m 2"] | None:
    """The dimensions of a head that the model's rotary embedding turns together, fastest pair first; None without one.

    Asks the function by which the model's own attention rotates what it does to each dimension at position 1, so both
    layouts (halves, neighbours) and rotations of a part of the dimensions are read off, not looked up.
    """
    network = unwrap(model)
    module = next(iter(attention_layers(network).values()))
    rotate: Any = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    embedding: Any = next((part for part in network.modules() if "rotary" in type(part).__name__.lower()), None)
    if rotate is None or embedding is None:
        return None
    # layers of two kinds turn at two speeds, in the same pairs and order
    by_kind = "layer_type" in inspect.signature(embedding.forward).parameters
    kind = {"layer_type": network.config.get_text_config().layer_types[0]} if by_kind else {}
    dims = HeadLayout.of(network).head_dim
    device = next(network.parameters()).device
    place = torch.ones(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        cos, sin = embedding(torch.zeros(1, device=device), place, **kind)
        turned = None
        # some attentions cut off the dimensions that turn before they call it
        for size in (dims, cos.shape[-1]):
            each = torch.eye(size, device=device)[None, None]
            try:
                turned = rotate(each, each, cos, sin)[0][0, 0]
                break
            except RuntimeError:
                continue
    if turned is None:
        return None
    beside = (turned - turned.diag().diag()).abs()
    angle, partner = beside.max(-1)
    pairs = {(min(i, j), max(i, j)): float(angle[i]) for i, j in enumerate(partner.tolist()) if angle[i] > 0}
    return torch.tensor(sorted(pairs, key=lambda pair: -pairs[pair])) if pairs else None


def _band(
    q: Float[Tensor, "b l h q d"], k: Float[Tensor, "b l g q d"], pairs: Int[Tensor, "m 2"], bands: int
) -> Float[Tensor, "b l h"]:
    """The share of the fastest pairs in what all pairs can add to the scores."""
    sizes = [x.float()[..., pairs].norm(dim=-1) for x in (q, k)]
    own = sizes[1].repeat_interleave(q.shape[2] // k.shape[2], 2)
    each = (sizes[0] * own).nanmean(3)
    return each[..., :bands].sum(-1) / each.sum(-1)
