"""Task-KV: heads whose summary of the prompt's values is far from that of the other heads of their layer."""

from dataclasses import dataclass
from functools import partial
from math import floor
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses import costs
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.layers import projection_name
from interp.hooks.model.provenance import Provenance
from interp.hooks.model.weights import acting_weight
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.attention_calls import AttentionCallTap, read_attention_calls
from interp.hooks.seam import ReadRequest, Site
from interp.kernels.contract import Columns

__all__ = ["heterogeneous", "task_kv"]


@analysis(
    title="Task-KV",
    group="long context",
    order=12,
    sets=("long",),
    prompts=standard.long_needles,
    cost=costs.reading(),
    source_settings={"rows": 32, "top": 256, "weighted": False},
)
def task_kv(
    model: nn.Module,
    prompts: Prompts,
    *,
    rows: int = 32,
    top: int = 256,
    weighted: bool = False,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by the semantic distance of its output at the end of the prompt from the mean of its layer.

    `c[h k] = mean over the last "rows" q of pattern[h q k]`, `s[h d] = sum over the "top" keys k with the largest c[h
    k] of c[h k] v[h k d]`, and `score[n l h] = |s[h] - mean over h of s|` (L2, which the paper leaves open).

    A prompt with fewer queries or keys uses all it has. Each prompt scores by itself, since its task may differ. Query
    heads of a kv head share v and differ by c alone. `heterogeneous` chooses heads by these scores.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Any prompts.
        rows: Number of last queries whose attention is averaged.
        top: Number of keys that are summed.
        weighted: Use s[h d] W_O[h d m] instead, the same in the residual stream, where heads that write little are
            near.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in the unit of values.

    Raises:
        UsageError: If `rows` or `top` is below 1.

    Examples:
        >>> scores = interp.identify.task_kv(model, prompts, rows=4)
        >>> scores.per_prompt.shape
        torch.Size([2, 2, 4])

    Source:
        Task-KV, 2501.15113; no code is known.

    Differs:
        The weighted variant is our addition.

    Limits:
        Does not show that a far head matters. The distance bounds what is lost only together with the size of W_O. In a
        prompt with no more than `top` keys, every key is summed and the choice of keys plays no part.
    """
    if min(rows, top) < 1:
        raise UsageError(f"rows={rows}, top={top} are too small; give at least one query and one key.")
    title = "task_kv" if progress else None
    reader = partial(_Reader, rows, top, weighted)
    found = read_attention_calls(model, prompts, reader, batch_size=batch_size, progress=title)["distance"]
    return HeadScores(
        name="task_kv",
        per_prompt=found,
        unit="distance of values" if not weighted else "distance in the residual stream",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"rows": rows, "top": top, "weighted": weighted},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        seed=seed,
        labels=tuple(f"{length} tokens" for length in prompts.lengths),
    )


def heterogeneous(scores: HeadScores, b: float = 0.25, m: int = 4) -> HeadSet:
    """Choose the heads of each layer that keep a full cache: the farthest from its centre, and the nearest one.

    `f(r) = n b - (n b - m) r / (R - 1)` heads of layer r of R, rounded, for n heads per layer: from the share b in the
    first layer to m heads in the last. The nearest head takes the place of the last of them; where f is 1, the farthest
    stays. A kv head is full where any of its query heads is.

    Args:
        scores: Scores of `task_kv`.
        b: Share of heads of the first layer.
        m: Number of heads of the last layer.

    Returns:
        HeadSet: The heads that keep a full cache.

    Raises:
        UsageError: If the share is not in (0, 1], m is not from 1 to n, or a head has no score.

    Examples:
        >>> len(interp.identify.heterogeneous(interp.identify.task_kv(model, prompts), b=0.5, m=1))
        3

    Source:
        Task-KV, 2501.15113 (b = 0.25, m = 4 for Llama-2-7B-Chat; 0.3 and 1 for Mistral-7B-Instruct-v0.2).

    Differs:
        The distances of several prompts are averaged. Rounding, half up, is our choice.

    Limits:
        Does not give a budget for models with kv groups; the paper does not say how query heads share one.
    """
    n, layers = scores.n_heads, scores.layers
    if not 0 < b <= 1 or not 1 <= m <= n:
        raise UsageError(
            f"b={b}, m={m} are out of range; give a share in (0, 1] and 1 to {n} heads for the last layer."
        )
    if scores.values.isnan().any():
        raise UsageError(f"'{scores.name}' has heads without a score; give a distance for every head.")
    chosen = []
    for layer, distances in enumerate(scores.values):
        count = max(1, floor(n * b - (n * b - m) / max(1, layers - 1) * layer + 0.5))
        order = distances.sort(descending=True, stable=True).indices.tolist()
        kept = order[:count] if count in (1, n) else [*order[: count - 1], order[-1]]
        chosen += [Head(layer, head) for head in kept]
    return HeadSet(tuple(chosen))


@dataclass(eq=False)
class _Reader(AttentionCallTap):
    """Averages the attention that the last queries pay to each key."""

    rows: int
    top: int
    weighted: bool

    def want(self, site: Site) -> ReadRequest | None:
        n = site.call.q.shape[2]
        return ReadRequest((Columns("sum"),), torch.arange(max(0, n - self.rows), n, device=site.call.q.device))

    def take(self, site: Site, want: ReadRequest, values: tuple[Any, ...]) -> None:
        call = site.call
        received = values[0][0]
        b, h, _, n, _ = call.sizes
        live = (
            received.new_full((b,), min(n, self.rows))
            if call.row_live is None
            else call.row_live[:, -self.rows :].sum(1)
        )
        mean = received / live.clamp(min=1)[:, None, None]
        weights = output_weights(site.module, h, call.v) if self.weighted else None
        far = distances(mean, call.v.detach(), self.top, weights)
        self.found[site.layer] = {"distance": far.float().cpu()}


def distances(
    mean: Float[Tensor, "b h k"],
    v: Float[Tensor, "b g k d"],
    top: int,
    weights: Float[Tensor, "h d m"] | None = None,
) -> Float[Tensor, "b h"]:
    """Distance of what a head gathers from its `top` keys from the mean of its layer, as in `task_kv`."""
    weight, key = mean.topk(min(top, mean.shape[-1]), -1)
    group = torch.arange(mean.shape[1], device=key.device) // (mean.shape[1] // v.shape[1])
    row = torch.arange(len(mean), device=key.device)[:, None, None]
    value = v[row, group[None, :, None], key].to(weight.dtype)
    gathered = torch.einsum("bhk,bhkd->bhd", weight, value)
    if weights is not None:
        gathered = torch.einsum("bhd,hdm->bhm", gathered, weights.to(weight.dtype))
    return (gathered - gathered.mean(1, keepdim=True)).norm(dim=-1)


def output_weights(module: nn.Module, heads: int, like: Tensor) -> Float[Tensor, "h d m"]:
    """The output projection of an attention module, split by head; `like` has the dtype and device of its inputs."""
    projection: Any = getattr(module, str(projection_name(module)))
    return acting_weight(projection, like).detach().unflatten(0, (heads, -1))
