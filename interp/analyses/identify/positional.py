"""Positional heads: heads that attend a fixed number of tokens back, whatever token is there."""

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.analyses import costs
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import attention_layers, unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.model.weights import input_device
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.attention_calls import AttentionCallTap, read_attention_calls
from interp.hooks.read.visibility import visible_at
from interp.hooks.seam import ReadRequest, Site
from interp.kernels.contract import At

MAX_OFFSET = 8
"""largest number of tokens that a head can look back"""
N_BANDS = 8
"""default number of fastest frequencies"""
BACK = tuple(range(0, -MAX_OFFSET - 1, -1))
N_POSITIONS = 4096
"""number of positions whose norms are computed at once"""


@analysis(
    title="Positional",
    group="attention patterns",
    order=8,
    prompts=standard.repeated(copies=1, times=2),
    cost=costs.reading(),
    shown_extras={"delta": "Tokens back", "std": "Std over queries", "band": "Share of fast bands"},
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

    `offsets[n l h delta] = mean over q >= delta of pattern[n l h q q-delta]`, and `score[n l h] = max over delta in
    0..8 of offsets[n l h delta]`. A distance that the window of a layer does not reach is NaN.

    Each layer is averaged when its attention runs, so that the memory does not grow with the layers.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts of random tokens, such as `tasks.repeated(copies=1)`, in which a head can only look for a
            position. On text, a head that looks for the nearest words scores too.
        bands: Number of fastest frequencies in the extra "band"; 0 leaves it out, and with it the reading of q and k.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
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
    title = "positional" if progress else None
    extras = read_attention_calls(
        model, prompts, lambda: _Reader(rotated, bands), batch_size=batch_size, progress=title
    )
    # a shorter prompt or window has no such distance
    extras["delta"] = extras["offsets"].nan_to_num(-1.0).argmax(-1)
    extras["std"] = extras["std"].gather(-1, extras["delta"][..., None])[..., 0]
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
    device = input_device(network)
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


@dataclass(eq=False)
class _Reader(AttentionCallTap):
    """Averages each layer over its queries as its attention call passes, so that no row is held."""

    pairs: Int[Tensor, "m 2"] | None
    bands: int

    def want(self, site: Site) -> ReadRequest | None:
        band = torch.full(site.call.q.shape[:2], torch.nan)
        if self.pairs is not None:
            mean = _mean_norms(site, self.pairs)
            band = mean[..., : self.bands].sum(-1) / mean.sum(-1)
        self.found[site.layer] = {"band": band.float().cpu()}
        columns = _back(site)
        columns = torch.where(columns >= site.first[:, None, None], columns, -1)
        return ReadRequest((At(columns),))

    def take(self, site: Site, want: ReadRequest, values: tuple[Any, ...]) -> None:
        columns = _back(site)
        rows = torch.arange(columns.shape[1], device=columns.device)
        counts = ((columns >= site.first[:, None, None]) & (columns >= 0))[:, None]
        seen = visible_at(site.call, rows, columns).any(2)
        (back,), total = values, counts.sum(2)
        mean = (back * counts).sum(2) / total
        std = (((back - mean[:, :, None]) * counts).square().sum(2) / total).sqrt()
        hidden = ~seen.expand(mean.shape)
        found = {name: x.masked_fill(hidden, torch.nan).float().cpu() for name, x in (("offsets", mean), ("std", std))}
        self.found[site.layer] |= found


def _back(site: Site) -> Int[Tensor, "b q n"]:
    """Columns of the keys at distances 0 to 8 from each query, before the prompt included."""
    rows = site.call.rows
    return (rows[:, None] + torch.tensor(BACK, device=rows.device)).expand(len(site.first), -1, -1)


def _mean_norms(site: Site, pairs: Int[Tensor, "m 2"]) -> Float[Tensor, "b h m"]:
    """`u[b h m] = mean over positions of |q_m| |k_m|`, some positions at a time."""
    call, pairs = site.call, pairs.to(site.call.q.device)
    b, h, g, n, _ = call.sizes
    k = call.k[:, :, -n:]
    live = (call.rows >= site.first[:, None]).to(torch.float64)
    total = torch.zeros(b, h, len(pairs), dtype=torch.float64, device=pairs.device)
    for start in range(0, n, N_POSITIONS):
        part = slice(start, start + N_POSITIONS)
        q_norm, k_norm = (x[:, :, part].detach().float()[..., pairs].norm(dim=-1) for x in (call.q, k))
        both = q_norm * k_norm.repeat_interleave(h // g, 1)
        total += torch.einsum("bhqm,bq->bhm", both.double(), live[:, part])
    return total / live.sum(1)[:, None, None]
