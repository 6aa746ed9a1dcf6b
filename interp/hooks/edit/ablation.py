"""Taking heads out: ablations by name around forward() or generate(), one head set or another in each row."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from interp.errors import ModelError, PromptError, UsageError
from interp.hooks.edit.per_row_steering import own_by_layer, own_rows
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.layers import attention_layers, projection_inputs, unwrap
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep as keeps
from interp.hooks.read.capture import read
from interp.hooks.read.reductions import key_columns
from interp.hooks.seam import AttentionTap, ReadRequest, Site, tapping
from interp.kernels.contract import Call

AblationKind = Literal["zero", "mean", "resample", "uniform", "first"]
InterventionKind = Literal["zero", "mean", "resample", "uniform", "first", "scale", "patch"]
KINDS_WITH_REFERENCE = ("mean", "resample", "patch")


@dataclass(frozen=True)
class Intervention:
    """What is done to a head: an ablation of `ablate`, or one of two more. Plain data, to be sent to another process.

    "scale"  z[b q h] = factor z
    "patch"  z[b q h] = z of the same head at the same position of the reference prompt of the same number
    resample draws one reference prompt for each prompt, by `seed`, whatever batch it runs in.
    Raises UsageError for a kind that does not exist, a missing or needless reference or factor.
    """

    kind: InterventionKind
    factor: float | None = None
    reference: Prompts | None = field(default=None, repr=False)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(InterventionKind):
            raise UsageError(
                f"ablation {self.kind!r} does not exist: take one of {', '.join(get_args(InterventionKind))}."
            )
        if (self.reference is None) == (self.kind in KINDS_WITH_REFERENCE):
            need = "needs reference prompts" if self.reference is None else "takes no reference prompts"
            raise UsageError(
                f"ablation {self.kind!r} {need}: pass reference= for mean and resample, and for patch, only."
            )
        if self.reference is not None and not len(self.reference):
            raise UsageError(f"ablation {self.kind!r} has no reference prompts; the selection is empty.")
        if (self.factor is None) == (self.kind == "scale"):
            raise UsageError(f"{self.kind!r} with factor={self.factor}: give a factor for scale, and for it only.")

    @property
    def shared(self) -> bool:
        """Whether it does the same to every prompt."""
        return self.kind not in ("resample", "patch")

    def source(self, prompts: Prompts) -> Tensor | None:
        """Int [p] the reference prompt that each prompt takes from; None where it takes from none or from all.

        Raises PromptError where patch has no partner of the same length for each prompt.
        """
        if self.reference is None or self.kind == "mean":
            return None
        if self.kind == "resample":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randint(len(self.reference), (len(prompts),), generator=generator)
        if self.reference.lengths != prompts.lengths:
            raise PromptError(
                f"patching takes each prompt's own partner: {len(prompts)} prompts of {_some(prompts.lengths)} tokens "
                f"and {len(self.reference)} of {_some(self.reference.lengths)} were given; pair them in equal lengths."
            )
        return torch.arange(len(prompts))


def _some(lengths: tuple[int, ...]) -> str:
    return ", ".join(map(str, lengths[:4])) + (", ..." if len(lengths) > 4 else "")


@contextlib.contextmanager
def ablate(
    model: nn.Module, heads: Any, kind: AblationKind, *, reference: Prompts | None = None, seed: int = 0
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
    if kind not in get_args(AblationKind):
        raise UsageError(f"ablation {kind!r} does not exist: take one of {', '.join(get_args(AblationKind))}.")
    intervention = Intervention(kind, reference=reference, seed=seed)
    model = unwrap(model)
    layout = HeadLayout.of(model)
    chosen = HeadSet.parse(heads, layout)
    layout.check(chosen)
    if not len(chosen):
        yield
        return
    with intervene(model, intervention, [chosen], ReferenceOutputs.of(model, chosen, intervention)):
        yield


@contextlib.contextmanager
def intervene(
    model: nn.Module,
    intervention: Intervention,
    sets: Sequence[HeadSet],
    bank: "ReferenceOutputs | None" = None,
    source: Tensor | None = None,
) -> Iterator[None]:
    """Let an intervention act on other heads in each row of a batch, whose row r is changed in sets[r % len(sets)].

    bank: z of the reference prompts, by ReferenceOutputs.of, for all heads of the sets. source: Int [p], the reference
    prompt of the prompt r // len(sets); without it resample draws one for each row of each run. Exact: a row is what it would be
    alone. Raises HeadError for heads the model does not have.
    """
    model = unwrap(model)
    layout = HeadLayout.of(model)
    own = own_by_layer(sets, layout)
    if intervention.kind == "patch" and source is None:
        raise UsageError("patching needs to know each prompt's partner: give source=, or use sweep_sets.")
    if missing := sorted(set(own) - set(attention_layers(model))):
        raise ModelError(f"layers {missing} of {type(model).__name__} have no attention: name other heads.")
    acting = InterventionTap(layout, intervention, own, bank, source, torch.Generator().manual_seed(intervention.seed))
    with contextlib.ExitStack() as stack:
        if own and intervention.kind in ("uniform", "first", "resample", "patch"):
            stack.enter_context(tapping(model, acting))
        if own and intervention.kind not in ("uniform", "first"):
            stack.enter_context(projection_inputs(model, own, acting.replace))
        yield


@dataclass(eq=False)
class ReferenceOutputs:
    """z of some heads on the reference prompts, [n q x d], x in the order of the head set."""

    heads: tuple[Head, ...]
    z: Tensor
    lengths: Tensor

    @classmethod
    def of(
        cls, model: nn.Module, heads: HeadSet, intervention: Intervention, *, progress: bool = False
    ) -> "ReferenceOutputs | None":
        """Read what an intervention takes from its reference prompts; None where it takes nothing."""
        if intervention.reference is None:
            return None
        reference, order = intervention.reference, tuple(heads)
        longest = max(reference.lengths)
        values, total, count = [], torch.zeros(()), 0
        title = "reference prompts" if progress else None
        for _, cap in read(model, reference, keeps.z(), heads=heads, progress=title):
            # [1 x q d] of one prompt, whose queries are all real
            z = cap[keeps.z()].float()
            if intervention.kind == "mean":
                total, count = total + z.sum((0, 2)), count + z.shape[2]
            else:
                values.append(torch.nn.functional.pad(z[0].transpose(0, 1), (0, 0, 0, 0, 0, longest - z.shape[2])))
        if intervention.kind == "mean":
            return cls(order, (total / count)[None, None], torch.ones(1, dtype=torch.int64))
        return cls(order, torch.stack(values), torch.tensor(reference.lengths))


@dataclass(eq=False)
class InterventionTap(AttentionTap):
    """One intervention as the seam and the output projections see it."""

    layout: HeadLayout
    intervention: Intervention
    own: dict[int, Tensor]
    """by layer, Bool [set h]"""
    bank: ReferenceOutputs | None
    source: Tensor | None
    generator: torch.Generator
    _position: dict[int, Tensor] = field(default_factory=dict)
    _draw: Tensor | None = None

    def at(self, layer: int) -> bool:
        return layer in self.own

    def want(self, site: Site) -> ReadRequest | None:
        if self.bank is not None:
            rows = site.call.rows
            self._position[site.layer] = (rows[None] - site.first[:, None]).clamp(min=0).cpu()
            if self.source is None and not site.call.q_start and site.layer == min(self.own):
                # a new run: other rows, other prompts to take from
                self._draw = torch.randint(len(self.bank.lengths), (len(site.first),), generator=self.generator)
        return None

    def edit(self, site: Site) -> Call:
        call = site.call
        if self.intervention.kind not in ("uniform", "first"):
            return call
        own = own_rows(self.own[site.layer], len(site.first)).to(call.q.device)
        if self.intervention.kind == "uniform":
            before = torch.ones((), device=call.q.device) if call.logit_scale is None else call.logit_scale
            return replace(call, logit_scale=torch.where(own, 0.0, before))
        other = key_columns(site)[None] != site.first[:, None]
        bias = torch.where(own[..., None] & other[:, None], -torch.inf, 0.0)
        return replace(call, key_bias=bias if call.key_bias is None else call.key_bias + bias)

    def replace(self, layer: int, x: Tensor) -> Tensor:
        """x [b q h*d] with the z of the heads replaced, in the rows that they are taken out of."""
        z = x.unflatten(-1, (self.layout.heads, -1))
        own = own_rows(self.own[layer], len(z)).to(z.device)
        heads = own.any(0).nonzero()[:, 0].tolist()
        made = z.clone()
        made[:, :, heads] = torch.where(own[:, None, heads, None], self._value(layer, heads, z), z[:, :, heads])
        return made.flatten(-2)

    def _value(self, layer: int, heads: list[int], z: Tensor) -> Tensor:
        """What takes the place of z for some heads of a layer, [b|1 q|1 x d]."""
        if self.intervention.kind == "scale":
            return z[:, :, heads] * float(self.intervention.factor or 0.0)
        if self.bank is None:
            return z.new_zeros(())
        part = [self.bank.heads.index(Head(layer, head)) for head in heads]
        if self.intervention.kind == "mean":
            return self.bank.z[:, :, part].to(z)
        draw = self._draw if self.source is None else self.source.repeat_interleave(len(z) // len(self.source))
        if draw is None:
            raise UsageError("resampling began in the middle of a run: open the context before the prompt is read.")
        place = torch.minimum(self._position.pop(layer), self.bank.lengths[draw, None] - 1)
        return self.bank.z[draw[:, None, None], place[..., None], torch.tensor(part)].to(z)
