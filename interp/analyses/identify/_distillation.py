"""Gates between full and streaming attention, trained by distillation from the unmodified model."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.analyses.results.files import pack, unpack
from interp.errors import ScoreError, UsageError
from interp.hooks.edit.layer_checkpoints import layer_checkpoints
from interp.hooks.edit.streaming_mix import streaming_mix
from interp.hooks.model.finite import check_model
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import attention_layers, projection_inputs
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs
from interp.hooks.writer import make_folder, write_atomic

Full = Literal["teacher", "student"]


@dataclass(frozen=True)
class Settings:
    """Settings of one training; see `identify.duo_gates`."""

    sink: int
    recent: int
    steps: int
    lr: float
    l1: float
    full: Full
    span: str
    batch_size: int

    def __post_init__(self) -> None:
        if self.full not in ("teacher", "student"):
            raise UsageError(f"unknown full {self.full!r}; choose from 'teacher', 'student'.")
        if min(self.steps, self.batch_size) < 1 or self.lr <= 0 or self.l1 < 0:
            raise UsageError(
                f"steps={self.steps}, batch_size={self.batch_size}, lr={self.lr}, l1={self.l1} are out of range; "
                "give at least one step and one prompt, a rate above 0, and a penalty of 0 or more."
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        fifth = self.steps / 5
        return self.lr * min(1.0, max((step + 1) / fifth, 0.1), max((self.steps - step) / fifth, 0.1))


@dataclass(eq=False)
class State:
    """Gates between two steps, with everything that the next step needs."""

    gates: nn.Parameter
    optimiser: torch.optim.AdamW
    losses: Float[Tensor, "t"]
    """distillation loss of each step so far"""

    @classmethod
    def open(cls, path: Path | None, layout: HeadLayout, settings: Settings) -> "State":
        """The state that a file holds, or the state at the start.

        Raises:
            ScoreError: If the file is broken.
        """
        gates = nn.Parameter(torch.ones(layout.layers, layout.kv_heads))
        state = cls(gates, torch.optim.AdamW([gates], settings.lr, weight_decay=0.0), torch.zeros(0))
        if path is None or not path.is_file():
            return state
        try:
            held = unpack(path)
            gates.data = held["gates"]
            state.losses = held["losses"]
            moments = {name: held[name] for name in ("step", "exp_avg", "exp_avg_sq")}
        except KeyError as error:
            raise ScoreError(f"{path} is broken ({error}); delete it and run again.") from None
        state.optimiser.state[gates] = moments
        return state

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return len(self.losses)

    def advance(self, model: Any, batch: Prompts, settings: Settings, checkpoint: bool = True) -> None:
        """Take one step on a batch; with `checkpoint` the backward pass computes the layers again."""
        self.gates.data.clamp_(0, 1)
        gates = self.gates.clamp(0, 1)
        with torch.enable_grad(), distillation(model, batch, gates, settings, checkpoint) as lost:
            loss = lost + settings.l1 * self.gates.abs().mean()
            (self.gates.grad,) = torch.autograd.grad(loss, self.gates)
        self.optimiser.param_groups[0]["lr"] = settings.rate(self.step)
        self.optimiser.step()
        self.losses = torch.cat([self.losses, lost.detach().cpu()[None]])

    def save(self, path: Path | None) -> None:
        """Write the state to a file, completely or not at all.

        Raises:
            ScoreError: If the file cannot be written.
        """
        if path is None:
            return
        make_folder(path.parent)
        moments = {name: value.detach() for name, value in self.optimiser.state[self.gates].items()}
        write_atomic(path, pack({"gates": self.gates, "losses": self.losses, **moments}, path.name))


@contextlib.contextmanager
def distillation(
    model: Any, batch: Prompts, gates: Float[Tensor, "l g"], settings: Settings, checkpoint: bool = True
) -> Iterator[Tensor]:
    """Mean over labelled tokens and dimensions of the squared distance of two runs after the final norm, in float32.

    With `checkpoint` the backward pass computes the layers again, so that it has to run inside the context.
    """
    inputs = model_inputs(model, batch)
    held: dict[int, Tensor] = {}

    def body() -> Tensor:
        return model.base_model(**inputs, use_cache=False).last_hidden_state[counted].float()

    def keep(layer: int, x: Tensor) -> None:
        held[layer] = x.detach()

    counted = labelled(batch, settings.span).to(inputs["input_ids"].device)
    layers = attention_layers(model) if settings.full == "teacher" else ()
    with torch.no_grad(), projection_inputs(model, layers, keep):
        teacher = body()
    if not bool(torch.isfinite(teacher).all()):
        check_model(model, inputs)
    full = held if settings.full == "teacher" else None
    with (
        streaming_mix(model, gates, sink=settings.sink, recent=settings.recent, full=full),
        layer_checkpoints(model) if checkpoint else contextlib.nullcontext(),
    ):
        yield (teacher - body()).pow(2).mean()


def labelled(batch: Prompts, span: str) -> Bool[Tensor, "b n"]:
    """Tokens of a span, in columns of the batch padded on the left."""
    mask = batch.span_mask(span)
    return torch.stack([row.roll(mask.shape[1] - n) for row, n in zip(mask, batch.lengths, strict=True)])


def order_of(n: int, count: int, seed: int) -> list[int]:
    """Prompts of all steps; each comes once before any comes again."""
    rng, order = Random(f"duo/{seed}"), []
    while len(order) < count:
        order += rng.sample(range(n), n)
    return order[:count]


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze the weights, so that a graph holds no more than the gates need."""
    with contextlib.ExitStack() as stack:
        for weight in [weight for weight in model.parameters() if weight.requires_grad]:
            stack.callback(weight.requires_grad_, True)
            weight.requires_grad_(False)
        yield
