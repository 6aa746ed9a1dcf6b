"""Positional heads: heads that attend a fixed number of tokens back, whatever token is there."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.analyses import costs
from interp.analyses.identify._spread import spread
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import attention_layers, unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep as keeps
from interp.hooks.read.capture import read

MAX_OFFSET = 8
"""largest number of tokens that a head can look back"""
N_BANDS = 8
"""default number of fastest frequencies"""
OFFSETS = keeps.at(*range(0, -MAX_OFFSET - 1, -1))


def _streams(prompts: Prompts, settings: Mapping[str, Any]) -> tuple[keeps.Keep, ...]:
    """Keeps that the extra "band" needs, from which its cost follows."""
    return (keeps.q(), keeps.k()) if settings.get("bands", N_BANDS) else ()


@analysis(
    title="Positional",
    group="attention patterns",
    order=8,
    prompts=standard.repeated(copies=1, times=2),
    cost=costs.reading(OFFSETS, _streams),
)
def positional(
    model: nn.Module,
    prompts: Prompts,
    *,
    bands: int = N_BANDS,
    batch_size: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its mean attention to the key at the best fixed distance.

    `offsets[n l h delta] = mean over q >= delta of pattern[n l h q q-delta]`, and
    `score[n l h] = max over delta in 0..8 of offsets[n l h delta]`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts of random tokens, such as `tasks.repeated(copies=1)`, in which a head can only look for a
            position. On text, a head that looks for the nearest words scores too.
        bands: Number of fastest frequencies in the extra "band"; 0 leaves it out, and with it the reading of q and k,
            which takes memory.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the intervals.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in shares of attention. Extras: "offsets"; "delta", the best distance;
            "std", the population std over q of `pattern[n l h q q-delta]` at that distance, low for a head that does
            not look at content; "band", the share of the fastest frequencies m of RoPE, `band = sum over m < bands of u
            / sum over m of u`, with `u[n l h m] = mean over positions of |q_m| |k_m|`, the norms of the pair of
            dimensions that rotates at frequency m. "band" is NaN where a model or a layer does not rotate, as with
            learned positions.

    Raises:
        UsageError: If `bands` is below 0.

    Examples:
        >>> scores = interp.identify.positional(model, interp.tasks.repeated(tokenizer, n=20, copies=1, batch=2))
        >>> scores.extras["offsets"].shape
        torch.Size([2, 2, 4, 9])

    Source:
        Barbero et al. 2410.06205 (bands, diagonal heads).

    Differs:
        There is one score for distances up to 8, and the std is over queries. Pairs of dimensions are found by applying
        the model's own rotation, whether it pairs halves or neighbours. Dimensions that are not rotated are in no band.

    Limits:
        Does not show that a head needs its fast bands; a large u may belong to pairs that cancel each other.
    """
    if bands < 0:
        raise UsageError(
            f"bands={bands} is negative; give how many of the fastest frequencies to count, or 0 for none."
        )
    rotated = pairs_of_dimensions(model) if bands else None
    keep = OFFSETS
    streams = [] if rotated is None else [keeps.q(), keeps.k()]
    found = {"offsets": [], "delta": [], "std": [], "band": []}
    for _, cap in read(
        model, prompts, [keep, *streams], batch_size=batch_size, progress="positional" if progress else None
    ):
        back = cap[keep]
        early = torch.arange(back.shape[3])[:, None] < torch.arange(MAX_OFFSET + 1)
        back = back.masked_fill(early, torch.nan)
        mean = back.nanmean(3)
        # a shorter prompt has no such distance
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
    """Pairs of dimensions that the model's rotary embedding rotates together, the fastest pair first; None without one.

    The function by which the model's own attention rotates is applied to each dimension at position 1. Both layouts
    (halves and neighbours) and rotations of a part of the dimensions are found this way, not looked up.
    """
    network = unwrap(model)
    module = next(iter(attention_layers(network).values()))
    rotate: Any = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    embedding: Any = next((part for part in network.modules() if "rotary" in type(part).__name__.lower()), None)
    if rotate is None or embedding is None:
        return None
    # layers of two kinds rotate at two speeds, in the same pairs and order
    by_kind = "layer_type" in inspect.signature(embedding.forward).parameters
    kind = {"layer_type": network.config.get_text_config().layer_types[0]} if by_kind else {}
    dims = HeadLayout.of(network).head_dim
    device = next(network.parameters()).device
    place = torch.ones(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        cos, sin = embedding(torch.zeros(1, device=device), place, **kind)
        turned = None
        # some attention modules cut off the rotated dimensions before they call it
        for size in (dims, cos.shape[-1]):
            each = torch.eye(size, device=device)[None, None]
            try:
                turned = rotate(each, each, cos, sin)[0][0, 0]
                break
            except RuntimeError:
                continue
    if turned is None:
        return None
    others = (turned - turned.diag().diag()).abs()
    angle, partner = others.max(-1)
    pairs = {(min(i, j), max(i, j)): float(angle[i]) for i, j in enumerate(partner.tolist()) if angle[i] > 0}
    return torch.tensor(sorted(pairs, key=lambda pair: -pairs[pair])) if pairs else None


def _band(
    q: Float[Tensor, "b l h q d"], k: Float[Tensor, "b l g q d"], pairs: Int[Tensor, "m 2"], bands: int
) -> Float[Tensor, "b l h"]:
    """Share of the fastest pairs in the largest score that all pairs together can give."""
    sizes = [x.float()[..., pairs].norm(dim=-1) for x in (q, k)]
    own = sizes[1].repeat_interleave(q.shape[2] // k.shape[2], 2)
    each = (sizes[0] * own).nanmean(3)
    return each[..., :bands].sum(-1) / each.sum(-1)
