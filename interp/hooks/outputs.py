"""Taking heads out: ablations by name, as a context around forward() or generate()."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from interp.hooks import keep as keeps
from interp.hooks.capture import read
from interp.hooks.heads import Head, HeadLayout, HeadSet
from interp.hooks.modules import plain, projection_inputs
from interp.hooks.prompts import Prompts
from interp.hooks.seam import Site, Want, tapping
from interp.kernels.contract import Call
from interp.kernels.errors import UsageError

Kind = Literal["zero", "mean", "resample", "uniform", "first"]


@contextlib.contextmanager
def ablate(
    model: nn.Module, heads: Any, kind: Kind, *, reference: Prompts | None = None, seed: int = 0
) -> Iterator[None]:
    """Replace what the heads write, for as long as the context is open; prefill and decode alike.

    kind, always named:
      "zero"      z[b q h] = 0 at the input of the output projection
      "mean"      z[b q h] = mean of z over all tokens of all `reference` prompts
      "resample"  z[b q h] = z of the same head at the same position of a `reference` prompt drawn for each row, seeded;
                  past that prompt's end, of its last position
      "uniform"   attention flat over the keys a query sees (logit scale 0; a learned sink keeps a share of its own)
      "first"     all attention on the first real token (a learned sink keeps its share); where a window no longer
                  reaches it, the output is 0
    heads: anything HeadSet.parse takes.
    Raises HeadError for heads the model does not have, UsageError for a missing or needless reference.
    Source: zero as in causal head studies; uniform is what "masking" means in the code of Wu et al. 2404.15574, which
    masks decode steps only, while we hold prefill and decode to the same. Cannot show: what a head would do had the
    rest been trained without it; zero moves the residual stream off its distribution.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"ablation {kind!r} does not exist: take one of {', '.join(get_args(Kind))}.")
    if (reference is None) == (kind in ("mean", "resample")):
        need = "needs reference prompts" if reference is None else "takes no reference prompts"
        raise UsageError(f"ablation {kind!r} {need}: pass reference= for mean and resample only.")
    model = plain(model)
    layout = HeadLayout.of(model)
    chosen = HeadSet.parse(heads, layout)
    layout.check(chosen)
    if not len(chosen):
        yield
        return
    bank = None if reference is None else _bank(model, chosen, reference, kind)
    ablation = Ablation(layout, chosen, kind, bank, torch.Generator().manual_seed(seed))
    with contextlib.ExitStack() as stack:
        if kind != "zero" and kind != "mean":
            stack.enter_context(tapping(model, ablation))
        if kind in ("zero", "mean", "resample"):
            stack.enter_context(projection_inputs(model, chosen.by_layer(), ablation.replace))
        yield


@dataclass(eq=False)
class Bank:
    """z of the ablated heads on the reference prompts, [n q x d], x in the order of the head set."""

    z: Tensor
    lengths: Tensor


def _bank(model: nn.Module, heads: HeadSet, reference: Prompts, kind: Kind) -> Bank:
    longest = max(reference.lengths)
    values, total, count = [], torch.zeros(()), 0
    for _, cap in read(model, reference, keeps.z(), heads=heads, progress="reference prompts"):
        # [1 x q d] of one prompt, whose queries are all real
        z = cap[keeps.z()].float()
        if kind == "mean":
            total, count = total + z.sum((0, 2)), count + z.shape[2]
        else:
            values.append(torch.nn.functional.pad(z[0].transpose(0, 1), (0, 0, 0, 0, 0, longest - z.shape[2])))
    if kind == "mean":
        return Bank((total / count)[None, None], torch.ones(1, dtype=torch.int64))
    return Bank(torch.stack(values), torch.tensor(reference.lengths))


@dataclass(eq=False)
class Ablation:
    """One ablation as the seam and the output projections see it."""

    layout: HeadLayout
    heads: HeadSet
    kind: Kind
    bank: Bank | None
    generator: torch.Generator
    _position: dict[int, Tensor] = field(default_factory=dict)
    _draw: Tensor | None = None

    def at(self, layer: int) -> bool:
        return layer in self.heads.by_layer()

    def want(self, site: Site) -> Want | None:
        if self.kind == "resample":
            rows = site.call.rows
            self._position[site.layer] = (rows[None] - site.first[:, None]).clamp(min=0).cpu()
            if not site.call.q_start and site.layer == min(self.heads.by_layer()):
                # a new run: other rows, other prompts to take from
                self._draw = torch.randint(len(self._bank.lengths), (len(site.first),), generator=self.generator)
        return None

    def take(self, site: Site, want: Want, values: tuple[Any, ...]) -> None:
        return None

    def edit(self, site: Site) -> Call:
        call = site.call
        index = torch.tensor(self.heads.by_layer()[site.layer], device=call.q.device)
        if self.kind == "uniform":
            scale = (
                torch.ones(self.layout.heads, device=call.q.device) if call.logit_scale is None else call.logit_scale
            )
            return replace(call, logit_scale=scale.index_fill(-1, index, 0.0))
        if self.kind == "first":
            bias = torch.zeros(call.sizes[0], self.layout.heads, call.sizes[4], device=call.q.device)
            other = keeps.key_columns(site)[None] != site.first[:, None]
            bias[:, index] = torch.where(other, -torch.inf, 0.0)[:, None].expand(-1, len(index), -1)
            return replace(call, key_bias=bias if call.key_bias is None else call.key_bias + bias)
        return call

    @property
    def _bank(self) -> Bank:
        if self.bank is None:
            raise UsageError(f"ablation {self.kind!r} has no reference values.")
        return self.bank

    def replace(self, layer: int, x: Tensor) -> Tensor:
        """x [b q h*d] with the z of the ablated heads replaced."""
        heads = self.heads.by_layer()[layer]
        z = x.unflatten(-1, (self.layout.heads, -1)).clone()
        z[:, :, list(heads)] = self._value(layer, heads, z) if self.bank is not None else 0.0
        return z.flatten(-2)

    def _value(self, layer: int, heads: tuple[int, ...], z: Tensor) -> Tensor:
        """[b q x d] of the bank for the heads of one layer."""
        bank = self._bank
        order = list(self.heads)
        part = [order.index(Head(layer, head)) for head in heads]
        if self.kind == "mean":
            return bank.z[:, :, part].to(z)
        if self._draw is None:
            raise UsageError("resampling began in the middle of a run: open the context before the prompt is read.")
        place = torch.minimum(self._position.pop(layer), bank.lengths[self._draw, None] - 1)
        return bank.z[self._draw[:, None], place][:, :, part].to(z)
