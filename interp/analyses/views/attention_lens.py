"""Attention lens: a trained map from the output of each head of a layer to the vocabulary."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.measures.head_outputs import HeadOutputs, bridged, by_length
from interp.analyses.memory import free_memory
from interp.analyses.results.files import plain
from interp.errors import CostError, HeadError, ScoreError, UsageError
from interp.hooks.model.heads import Head, HeadLayout
from interp.hooks.model.layers import unwrap
from interp.hooks.model.portable import portable
from interp.hooks.model.provenance import Provenance
from interp.hooks.model.weights import input_device
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context
from interp.hooks.writer import reason, write_atomic

FORMAT = "interp.lens/1"
MAX_LOGITS = 1 << 25
"""logits held at once"""
MAX_MEMORY_SHARE = 0.8
"""share of the free memory that training may take"""
Top = tuple[Tensor, Tensor]
"""values and columns, `[n k]` each"""


@dataclass(frozen=True, eq=False, repr=False)
class Lens:
    """One affine map for each head of a layer, from the output of the head, as the unembedding reads it, to logits.

    Only the sum over the heads was fitted, so the map of a single head is not unique: compare it with the view without
    a lens.
    """

    layer: int
    weight: Float[Tensor, "h m v"]
    bias: Float[Tensor, "h v"]
    provenance: Provenance
    losses: tuple[float, ...] = ()
    """KL divergence in nats before each training step"""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def plain(cls, model: nn.Module, layer: int, *, seed: int = 0) -> "Lens":
        """The lens before training: the unembedding for every head, and no bias.

        Args:
            model: A transformers causal language model, or a TransformerBridge over one.
            layer: The layer.
            seed: Seed for the provenance.

        Raises:
            HeadError: For a layer that the model does not have.
            ModelError: If the model has no bridge.
        """
        layout = HeadLayout.of(model)
        layout.check([Head(layer, 0)])
        with bridged(model) as tl:
            start = tl.W_U.detach().float()
            weight = start.repeat(layout.heads, 1, 1)
        return cls(layer, weight, weight.new_zeros(layout.heads, weight.shape[-1]), Provenance.of(model, seed=seed))

    def __call__(self, x: Float[Tensor, "b h m"]) -> Float[Tensor, "b v"]:
        """Logits from all heads together, which are what was fitted.

        Args:
            x: Output of each head, as the unembedding reads it.
        """
        return torch.einsum("bhm,hmv->bv", x, self.weight) + self.bias.sum(0)

    def of(self, head: Head) -> tuple[Float[Tensor, "m v"], Float[Tensor, "v"]]:
        """Weight and bias of one head.

        Args:
            head: A head of the layer.

        Raises:
            HeadError: For a head of another layer.
        """
        if head.layer != self.layer or head.head >= len(self.weight):
            raise HeadError(
                f"{head} is not in this lens; choose from the {len(self.weight)} heads of layer {self.layer}."
            )
        return self.weight[head.head], self.bias[head.head]

    def check(self, model: nn.Module) -> None:
        """Check that the lens was made for a model.

        Args:
            model: The model.

        Raises:
            ScoreError: For another model, with both fingerprints.
        """
        mine, given = self.provenance, Provenance.of(model)
        if not mine.same_model(given):
            raise ScoreError(
                f"this lens belongs to {mine.model or mine.architecture} (config {mine.config_hash}, weights "
                f"{mine.weights_hash}), the model given is {given.model or given.architecture} (config "
                f"{given.config_hash}, weights {given.weights_hash}); load that model in that dtype, or train another "
                "lens."
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all.

        Args:
            path: File name; ".safetensors" is added where it is missing.

        Returns:
            The path.

        Raises:
            ScoreError: Where the file cannot be written.
        """
        from safetensors.torch import save as serialise

        path = _named(path)
        about = {"layer": self.layer, "losses": self.losses, "settings": portable(self.settings)}
        about |= {"provenance": self.provenance.to_dict()}
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in ("weight", "bias")}
        header = {"format": FORMAT, "about": json.dumps(plain(about, "the header of this lens"))}
        return write_atomic(path, serialise(tensors, header))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "Lens":
        """Read a lens that `save` wrote, on the CPU.

        Args:
            path: The file.
            model: Where given, a lens of another model is refused.

        Raises:
            ScoreError: For a file that holds no lens, or a lens of another model.
        """
        from safetensors import SafetensorError, safe_open

        path = _named(path)
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ScoreError(
                        f"{path} has the format {header.get('format')!r}, expected {FORMAT!r}; give a file that "
                        "Lens.save wrote."
                    )
                lens = _made(cls, json.loads(header["about"]), *(file.get_tensor(name) for name in ("weight", "bias")))
        except OSError as error:
            raise ScoreError(f"{path} cannot be read ({reason(error)}); give a file that Lens.save wrote.") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ScoreError):
                raise
            raise ScoreError(f"{path} holds no lens ({error}); train it again.") from error
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
    """Fit one affine map for each head, so that the heads of a layer together give the model's next token.

    `loss = mean over b of KL(softmax(logits[b v]) || softmax(sum over h of (x[b h m] W[h m v] + c[h v])))` at the last
    position, where x is the output of a head as `logit_lens` reads it (norms with their scales in this run, gamma). W
    starts at the unembedding, c at 0.

    Adam takes the steps. Each step uses `batch_size` prompts; all prompts are used in a new order before one is used
    again. Inputs are read once, in float32. The model is not changed.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts to train on.
        layer: The layer.
        lr: Learning rate.
        steps: Number of training steps.
        batch_size: Number of prompts per step.
        seed: Seed of the order of the prompts.
        progress: Show a progress bar.

    Returns:
        Lens: float32 `weight [h m v]` and `bias [h v]`; `losses` are in nats.

    Raises:
        HeadError: For a layer that the model does not have.
        UsageError: For no prompts, or an `lr`, `steps` or `batch_size` that is not positive.
        CostError: If memory does not suffice for four times the h m v weights.
        ModelError: As `logit_lens`.

    Examples:
        >>> from interp.analyses.views.attention_lens import train_lens
        >>> lens = train_lens(model, prompts, 1, steps=2)
        >>> len(lens.losses)
        2

    Source:
        Sakarvadia et al. 2310.16270.

    Differs:
        x passes the norms before the unembedding. c starts at 0 rather than at the unembedding's bias for each head, so
        that an untrained lens is the view without a lens. Adam takes steps on batches without accumulation.

    Limits:
        Does not show the effect of one head. Only the sum over heads is fitted: where the inputs of two heads vary
        together, adding to one map what another loses changes nothing, so single heads are not unique. Compare with the
        view without a lens.
    """
    if steps < 1 or batch_size < 1 or not 0 < lr < torch.inf:
        raise UsageError(
            f"lr={lr}, steps={steps}, batch_size={batch_size} cannot train; give a positive rate and at least one each."
        )
    if not len(prompts):
        raise UsageError("there are no prompts to train a lens on; give at least one.")
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
    """KL divergence of a lens from the model, in nats, for each prompt at its last position.

    Args:
        model: The model that the lens was trained for.
        prompts: Prompts that it was not trained on.
        lens: The lens.

    Raises:
        ScoreError: For a lens of another model.
        ModelError: As `logit_lens`.

    Limits:
        Does not show that single heads are read correctly, see `train_lens`.
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
    """The k largest and the k smallest entries of `x W + bias`, and the rank of one column of each row.

    The vocabulary is read in parts: in 16 bits W would be in memory twice, and n rows of logits are many.

    Args:
        x: Rows.
        weight: W.
        bias: The bias, None for none.
        k: Number of entries.
        own: The column of each row whose rank is wanted, by default the first.

    Returns:
        The largest entries, the smallest ones, and the ranks, 0 for the largest.

    Raises:
        UsageError: For a k that exceeds the vocabulary.
    """
    known = weight.shape[1]
    if not 1 <= k <= known:
        raise UsageError(f"k={k} tokens of a vocabulary of {known} were requested; give a number from 1 to {known}.")
    own = torch.zeros(len(x), dtype=torch.int64) if own is None else own
    own = own.to(x.device)
    mine = torch.einsum("nm,mn->n", x, weight[:, own].float()) + (0 if bias is None else bias[own])
    rank, none = torch.zeros_like(own), (x.new_zeros(len(x), 0), own.new_zeros(len(x), 0))
    best, worst = none, none
    width = max(MAX_LOGITS // max(len(x), 1), 1024)
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
    free_bytes = free_memory(input_device(model))
    if needed > MAX_MEMORY_SHARE * free_bytes:
        raise CostError(
            f"training a lens of {layout.heads} heads, {m} to {v}, takes {needed / 1e9:.1f} GB, and "
            f"{free_bytes / 1e9:.1f} GB are free; use a smaller model or a larger machine."
        )
    return Lens.plain(model, layer, seed=seed)


def _inputs(model: nn.Module, prompts: Prompts, layer: int) -> tuple[Float[Tensor, "p h m"], Float[Tensor, "p v"]]:
    """Output of each head at the last position, and the model's log-probabilities there."""
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
