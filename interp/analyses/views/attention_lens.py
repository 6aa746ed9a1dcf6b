"""Attention Lens: a trained map from what each head of a layer writes to the vocabulary."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.causal.batch_size import free_memory
from interp.analyses.measures.head_outputs import HeadOutputs, bridged, by_length
from interp.analyses.results.files import plain, reason, write_atomic
from interp.errors import CostError, HeadError, ScoreError, UsageError
from interp.hooks.model.heads import Head, HeadLayout
from interp.hooks.model.layers import unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context

FORMAT = "interp.lens/1"
HELD = 1 << 25
"""logits held at once, in numbers"""
SHARE = 0.8
"""of the free memory that training may take"""
Top = tuple[Tensor, Tensor]
"""values and columns, [n k] each"""


@dataclass(frozen=True, eq=False, repr=False)
class Lens:
    """One affine map for each head of a layer, from what the head writes, read as the unembedding reads it, to logits.

    Only the sum over the heads was fitted, so a single head's map is not unique: compare with the plain view.
    """

    layer: int
    weight: Float[Tensor, "h m v"]
    bias: Float[Tensor, "h v"]
    provenance: Provenance
    losses: tuple[float, ...] = ()
    """KL in nats of each training step, before it was taken"""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def plain(cls, model: nn.Module, layer: int, *, seed: int = 0) -> "Lens":
        """The lens before it is trained: the unembedding for every head, no bias. Raises HeadError, ModelError."""
        layout = HeadLayout.of(model)
        layout.check([Head(layer, 0)])
        with bridged(model) as tl:
            start = tl.W_U.detach().float()
            weight = start.repeat(layout.heads, 1, 1)
        return cls(layer, weight, weight.new_zeros(layout.heads, weight.shape[-1]), Provenance.of(model, seed=seed))

    def __call__(self, x: Float[Tensor, "b h m"]) -> Float[Tensor, "b v"]:
        """Logits from all heads together, which are what was fitted."""
        return torch.einsum("bhm,hmv->bv", x, self.weight) + self.bias.sum(0)

    def of(self, head: Head) -> tuple[Float[Tensor, "m v"], Float[Tensor, "v"]]:
        """The map of one head. Raises HeadError."""
        if head.layer != self.layer or head.head >= len(self.weight):
            raise HeadError(
                f"{head} is not in this lens, which is of the {len(self.weight)} heads of layer {self.layer}."
            )
        return self.weight[head.head], self.bias[head.head]

    def check(self, model: nn.Module) -> None:
        """Raise ScoreError, naming both fingerprints, unless the lens was made for this model."""
        mine, given = self.provenance, Provenance.of(model)
        if not mine.same_model(given):
            raise ScoreError(
                f"this lens belongs to {mine.model or mine.architecture} (config {mine.config_hash}, weights "
                f"{mine.weights_hash}), the model given is {given.model or given.architecture} (config "
                f"{given.config_hash}, weights {given.weights_hash}): load that model in that dtype, or train another."
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all; .safetensors is added if missing. Raises ScoreError."""
        from safetensors.torch import save as serialise

        path = _named(path)
        about = {"layer": self.layer, "losses": self.losses, "settings": self.settings}
        about |= {"provenance": self.provenance.to_dict()}
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in ("weight", "bias")}
        header = {"format": FORMAT, "about": json.dumps(plain(about, "what is known of this lens"))}
        write_atomic(path, serialise(tensors, header))
        return path

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "Lens":
        """Read what save wrote, on the CPU. With `model`, a lens of another model raises ScoreError."""
        from safetensors import SafetensorError, safe_open

        path = _named(path)
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ScoreError(
                        f"{path} has the format {header.get('format')!r}, not {FORMAT!r}: give a file that Lens.save "
                        "wrote."
                    )
                lens = _made(cls, json.loads(header["about"]), *(file.get_tensor(name) for name in ("weight", "bias")))
        except OSError as error:
            raise ScoreError(f"{path} cannot be read ({reason(error)}): give a lens that Lens.save wrote.") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ScoreError):
                raise
            raise ScoreError(f"{path} is no lens ({error}): train it again.") from error
        if model is not None:
            lens.check(model)
        return lens

    def __repr__(self) -> str:
        heads, m, v = self.weight.shape
        trained = f"{len(self.losses)} steps, KL {self.losses[-1]:.3g}" if self.losses else "not trained"
        return f"Lens(layer {self.layer}, {heads} heads, {m} to {v}, {trained})"


def train_lens(
    model: nn.Module,
    prompts: Prompts,
    layer: int,
    *,
    lr: float = 1e-3,
    steps: int = 100,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Lens:
    """Fit one affine map a head so that the heads of a layer together give the model's next token.

    loss = mean over b of KL(softmax(logits[b v]) || softmax(sum over h of (x[b h m] W[h m v] + c[h v]))) at the last
    position, x what a head writes as `vocabulary` reads it (norms with their scales in this run, gamma); W starts at
    the unembedding, c at 0. Adam; each step takes `batch_size` prompts, all of them in a new order before one again.
    Inputs are read once, float32; in nats. The model is not changed.
    Raises HeadError (layer), UsageError (lr, steps, batch_size), CostError (h m v weights, four times), and ModelError
    as `vocabulary`.
    Source: Sakarvadia et al. 2310.16270. Differs: x passes the norms that lie before the unembedding, and c starts at 0
    rather than at the unembedding's bias for each head, so that an untrained lens is the plain view; Adam steps on
    batches without accumulation.
    Cannot show: what one head does. Only the sum over heads is fitted: adding to one map what another loses where their
    inputs go together changes nothing, so single heads are not unique. Compare with the plain view.
    """
    if steps < 1 or batch_size < 1 or not 0 < lr < torch.inf:
        raise UsageError(
            f"lr={lr}, steps={steps}, batch_size={batch_size}: give a positive rate and at least one each."
        )
    if not len(prompts):
        raise UsageError("no prompts to train a lens on; the selection is empty.")
    start = _affordable(model, layer, seed)
    x, wanted = _inputs(model, prompts, layer)
    weight, bias = (nn.Parameter(part) for part in (start.weight, start.bias))
    optimizer = torch.optim.Adam([weight, bias], lr=lr, fused=True)
    rng = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    order = torch.zeros(0, dtype=torch.int64)
    with torch.enable_grad():
        for _ in tqdm(range(steps), desc=f"lens of layer {layer}", disable=not progress, delay=2, leave=False):
            if not len(order):
                order = torch.randperm(len(x), generator=rng)
            chosen, order = order[:batch_size], order[batch_size:]
            made = torch.einsum("bhm,hmv->bv", x[chosen].to(weight.device), weight) + bias.sum(0)
            loss = _divergence(made, wanted[chosen].to(made.device)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    settings = {"lr": lr, "steps": steps, "batch_size": batch_size, "prompts": prompts.fingerprint(), "n": len(prompts)}
    provenance = Provenance.of(model, prompts.tokenizer, seed=seed)
    return Lens(layer, weight.detach(), bias.detach(), provenance, tuple(losses), settings)


def lens_loss(model: nn.Module, prompts: Prompts, lens: Lens) -> Float[Tensor, "p"]:
    """KL(model || lens) of each prompt at its last position, in nats: on prompts that it was not trained on.

    Raises ScoreError for a lens of another model, ModelError as `vocabulary`.
    Cannot show: that single heads are read rightly, see `train_lens`.
    """
    lens.check(model)
    x, wanted = _inputs(model, prompts, lens.layer)
    device = lens.weight.device
    with torch.no_grad():
        parts = [
            _divergence(lens(some.to(device)), there.to(device))
            for some, there in zip(x.split(8), wanted.split(8), strict=True)
        ]
    return torch.cat(parts).cpu()


def extremes(
    x: Float[Tensor, "n m"],
    weight: Float[Tensor, "m v"],
    bias: Float[Tensor, "v"] | None,
    k: int,
    own: Int[Tensor, "n"] | None = None,
) -> tuple[Top, Top, Int[Tensor, "n"]]:
    """The k largest and the k smallest of x W + bias, and the rank of one column of each row, 0 for the largest.

    A part of the vocabulary at a time: in 16 bits W would be here twice, and n rows of logits are many. UsageError for
    a k that the vocabulary does not have.
    """
    known = weight.shape[1]
    if not 1 <= k <= known:
        raise UsageError(f"k={k} tokens of a vocabulary of {known}: give a number from 1 to that.")
    own = torch.zeros(len(x), dtype=torch.int64) if own is None else own
    own = own.to(x.device)
    mine = torch.einsum("nm,mn->n", x, weight[:, own].float()) + (0 if bias is None else bias[own])
    rank, none = torch.zeros_like(own), (x.new_zeros(len(x), 0), own.new_zeros(len(x), 0))
    best, worst = none, none
    width = max(HELD // max(len(x), 1), 1024)
    for start in range(0, known, width):
        part = x @ weight[:, start : start + width].float()
        if bias is not None:
            part = part + bias[start : start + width]
        columns = torch.arange(start, start + part.shape[1], device=x.device)
        rank += ((part > mine[:, None]) & (columns != own[:, None])).sum(1)
        best, worst = _kept(best, part, columns, k, True), _kept(worst, part, columns, k, False)
    return best, worst, rank.cpu()


def _kept(before: Top, part: Float[Tensor, "n v"], columns: Int[Tensor, "v"], k: int, largest: bool) -> Top:
    values = torch.cat([before[0], part], 1)
    at = torch.cat([before[1], columns.expand(len(part), -1)], 1)
    values, order = values.topk(min(k, values.shape[1]), dim=1, largest=largest)
    return values, at.gather(1, order)


def _affordable(model: nn.Module, layer: int, seed: int) -> Lens:
    layout = HeadLayout.of(model)
    layout.check([Head(layer, 0)])
    config = unwrap(model).config.get_text_config()
    m, v = config.hidden_size, config.vocab_size
    # weight, gradient, and two moments of Adam
    needed = 4 * 4 * layout.heads * m * v
    there = free_memory(next(model.parameters()).device)
    if needed > SHARE * there:
        raise CostError(
            f"a lens of {layout.heads} heads, {m} to {v}, takes {needed / 1e9:.1f} GB to train, of which "
            f"{there / 1e9:.1f} GB are free: take a smaller model or a larger machine."
        )
    return Lens.plain(model, layer, seed=seed)


def _inputs(model: nn.Module, prompts: Prompts, layer: int) -> tuple[Float[Tensor, "p h m"], Float[Tensor, "p v"]]:
    """What each head writes at the last position, and the model's log-probabilities there."""
    check_context(model, prompts)
    layout = HeadLayout.of(model)
    x: list[Any] = [None] * len(prompts)
    wanted: list[Any] = [None] * len(prompts)
    with bridged(model) as tl, torch.no_grad():
        for index, (batch,) in by_length(prompts, batch_size=8):
            run = HeadOutputs.of(tl, batch, layout)
            read = run.read(run.heads[layer]).transpose(0, 1).cpu()
            there = run.logits.log_softmax(-1).cpu()
            for number, one, goal in zip(index, read, there, strict=True):
                x[number], wanted[number] = one, goal
    return torch.stack(x), torch.stack(wanted)


def _divergence(made: Float[Tensor, "b v"], wanted: Float[Tensor, "b v"]) -> Float[Tensor, "b"]:
    return nn.functional.kl_div(made.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1)


def _made(cls: type[Lens], about: Mapping[str, Any], weight: Tensor, bias: Tensor) -> Lens:
    if weight.dim() != 3 or bias.shape != (weight.shape[0], weight.shape[2]):
        raise ValueError(f"weight {list(weight.shape)} and bias {list(bias.shape)} do not fit together")
    provenance = Provenance.from_dict(about["provenance"])
    losses = tuple(float(loss) for loss in about["losses"])
    return cls(int(about["layer"]), weight, bias, provenance, losses, dict(about["settings"]))


def _named(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
