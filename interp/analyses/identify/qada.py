"""QAdA: for which queries the first and the last keys of a head are enough, told without touching the others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.scores import HeadScores
from interp.hooks.capture import run
from interp.hooks.heads import HeadLayout
from interp.hooks.modules import attention_layers
from interp.hooks.prompts import Prompts
from interp.hooks.provenance import Provenance
from interp.hooks.seam import Site, Want, tapping
from interp.kernels.contract import Call, Lse
from interp.kernels.errors import ModelError, PromptError, UsageError
from interp.kernels.moments import Moments, log_bulk
from interp.kernels.select import select
from interp.kernels.streaming import beyond, stream

Broken = Literal["clamp", "long"]
TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def qada(
    model: nn.Module,
    prompts: Prompts,
    *,
    tau: float = 0.9,
    sink: int = 16,
    window: int = 128,
    refresh: int = 64,
    least: int = 64,
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
    settings = _Settings(tau, sink, window, refresh, least, tuple(taus), broken)
    need = sink + window + least + refresh - 1
    for number, length in enumerate(prompts.lengths):
        if length < need:
            raise PromptError(
                f"prompt {number} has {length} tokens; {need} are needed before a query has {least} keys beyond the "
                f"first {sink} and the last {window}: give longer prompts, or a smaller window."
            )
    parts: dict[str, list[Tensor]] = {}
    total = -(-len(prompts) // batch_size)
    for batch in tqdm(
        prompts.batches(batch_size), desc="qada", total=total, disable=not progress, delay=2, leave=False
    ):
        reader = _Reader(settings)
        with tapping(model, reader):
            run(model, batch, logits_to_keep=1)
        layers = [reader.found[layer] for layer in attention_layers(model)]
        for name in layers[0]:
            parts.setdefault(name, []).append(torch.stack([layer[name] for layer in layers], 1))
    extras = {name: torch.cat(found) for name, found in parts.items()}
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


@dataclass(frozen=True)
class _Settings:
    tau: float
    sink: int
    window: int
    refresh: int
    least: int
    taus: tuple[float, ...]
    broken: Broken

    def __post_init__(self) -> None:
        if not all(0 < tau < 1 for tau in (self.tau, *self.taus)):
            raise UsageError(f"tau={self.tau}, taus={self.taus}: a share of attention lies between 0 and 1.")
        if self.broken not in get_args(Broken):
            raise UsageError(f"broken={self.broken!r}: say 'clamp' or 'long'.")
        if self.sink < 0 or min(self.window, self.refresh, self.least) < 1:
            raise UsageError(
                f"sink={self.sink}, window={self.window}, refresh={self.refresh}, least={self.least}: give at least 1, "
                "and a sink of 0 or more."
            )


@dataclass(eq=False)
class _Reader:
    """A tap that leaves attention as it is and notes, layer by layer, what its shares come to."""

    settings: _Settings
    found: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """[b h ...] each"""

    def at(self, layer: int) -> bool:
        return True

    def edit(self, site: Site) -> Call:
        return site.call

    def take(self, site: Site, want: Want, values: tuple[Any, ...]) -> None:
        return None

    def want(self, site: Site) -> Want | None:
        if site.call.mask is not None:
            raise ModelError(
                f"layer {site.layer} has a mask of its own, of which T keys beyond a window cannot be told: qada reads "
                "causal layers, with or without a window."
            )
        with torch.no_grad():
            found = _shares(replace(site.call, sinks=None), site.first, self.settings)
        self.found[site.layer] = {name: value.float().cpu() for name, value in found.items()}
        return None


def _shares(call: Call, first: Tensor, settings: _Settings) -> dict[str, Tensor]:
    """[b h ...] of one layer."""
    b, h = call.sizes[:2]
    if call.window is not None and call.window <= settings.window:
        none = call.q.new_zeros(b, h, dtype=call.dtype)
        local = none[..., None].expand(-1, -1, len(settings.taus)) + 1
        same = {"long": none, "oracle": none, "missed": none, "broken": none, "agreement": none + 1}
        return same | {"log_error": none * torch.nan, "sparsity": local, "oracle_sparsity": local}
    near = stream(call, settings.sink, settings.window, first)[1]
    rest = beyond(call, settings.sink, settings.window, first)
    bulk = select(rest, (Lse(),)).engine(rest, (Lse(),), out=False).values[0]
    estimate, v, keys, counts = (torch.cat(part, 2) for part in zip(*_blocks(call, first, settings), strict=True))
    broken = v > keys.log()
    tau = torch.tensor([settings.tau, *settings.taus], dtype=call.dtype, device=near.device)
    truth = (near - bulk)[..., None] < tau.logit()
    told = (near - estimate)[..., None] < tau.logit()
    if settings.broken == "long":
        told = told | broken[..., None]

    def share(x: Tensor, among: Tensor = counts) -> Tensor:
        """Mean over the queries that count, NaN where none does."""
        among = among.expand(near.shape)
        weight = among if x.dim() == 3 else among[..., None]
        return torch.where(weight, x.to(call.dtype), 0.0).sum(2) / weight.sum(2).to(call.dtype)

    return {
        "long": share(told[..., 0]),
        "oracle": share(truth[..., 0]),
        "agreement": share(told[..., 0] == truth[..., 0]),
        "missed": share(truth[..., 0] & ~told[..., 0]),
        "broken": share(broken),
        "log_error": share((estimate - bulk).abs(), counts & ~broken),
        "sparsity": share(~told[..., 1:]),
        "oracle_sparsity": share(~truth[..., 1:]),
    }


def _blocks(call: Call, first: Tensor, settings: _Settings) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each block of queries: estimate and v [b h q], keys beyond the window [b 1 q], whether a query counts."""
    b, h, g, n, _ = call.sizes
    moments = Moments.of(call, first + settings.sink)
    # counted from the end, where the prompts of a batch padded on the left are level
    starts = [0, *range(n % settings.refresh or settings.refresh, n, settings.refresh)]
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        row = call.q_start + torch.arange(start, stop, device=call.q.device)
        # one past the last key beyond the window of the block's first query
        high = call.q_start + start - settings.window + 1
        low = None if call.window is None else call.q_start + start - call.window + 1
        moments.move(high, low)
        begin = first + settings.sink
        lowest = begin[:, None] if call.window is None else torch.maximum(begin[:, None], row - call.window + 1)
        keys = (row - settings.window + 1 - lowest).clamp(min=0)
        counts = (moments.count >= settings.least)[:, None] & (keys > 0)
        if call.row_live is not None:
            counts = counts & call.row_live[:, start:stop]
        mean, covariance = moments.values(call.dtype)
        q = call.q[:, :, start:stop].to(call.dtype).reshape(b, g, -1, call.q.shape[-1])
        many = keys.clamp(min=1).to(call.dtype)
        estimate, v = log_bulk(q, mean, covariance, many.repeat(1, h // g)[:, None], call.scale)
        yield (
            estimate.view(b, h, -1),
            v.view(b, h, -1),
            many[:, None].expand(-1, h, -1),
            counts[:, None].expand(-1, h, -1),
        )
