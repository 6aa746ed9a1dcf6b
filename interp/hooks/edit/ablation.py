"""Ablations and other interventions on heads around forward() or generate(), with one head set or one per row."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from interp.errors import ModelError, PromptError, UsageError
from interp.hooks.edit.open_edits import opened_once
from interp.hooks.edit.per_row_steering import head_masks_by_layer, masks_of_rows
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.layers import attention_layers, projection_inputs, unwrap
from interp.hooks.model.repeats import is_repeating
from interp.hooks.model.scope import Scope
from interp.hooks.model.torch_state import own_defaults
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep
from interp.hooks.read.capture import read
from interp.hooks.seam import AttentionTap, Site, tapping
from interp.kernels.contract import Call

AblationKind = Literal["zero", "mean", "resample", "uniform", "first"]
"""The ablations of `ablate`."""
InterventionKind = Literal["zero", "mean", "resample", "uniform", "first", "scale", "patch"]
"""The ablations, and the two further interventions."""
KINDS_WITH_REFERENCE = ("mean", "resample", "patch")


@dataclass(frozen=True)
class Intervention:
    """An intervention on heads: one of the ablations of `ablate`, or "scale" or "patch".

    It is plain data that can be sent to another process.

    | kind | z of a head, at the input of the output projection |
    |---|---|
    | "zero", "mean", "resample", "uniform", "first" | as in `ablate` |
    | "scale" | `z[b q h] = factor z` |
    | "patch" | z of the same head at the same position of the reference prompt of the same number |

    "resample" draws one reference prompt for each prompt from the seed, whatever batch the prompt runs in.

    Args:
        kind: The kind of intervention.
        factor: Number that "scale" multiplies z by; for "scale" only.
        reference: Reference prompts; for "mean", "resample" and "patch" only.
        seed: Seed of the draws of "resample".

    Raises:
        UsageError: If the kind is unknown, or a factor or reference is missing or superfluous.

    Examples:
        >>> interp.Intervention("scale", factor=0.5)
        Intervention(kind='scale', factor=0.5, seed=0)
    """

    kind: InterventionKind
    factor: float | None = None
    reference: Prompts | None = field(default=None, repr=False)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(InterventionKind):
            raise UsageError(_unknown(self.kind, get_args(InterventionKind)))
        if (self.reference is None) == (self.kind in KINDS_WITH_REFERENCE):
            problem = "needs reference prompts" if self.reference is None else "takes no reference prompts"
            raise UsageError(f"ablation {self.kind!r} {problem}: pass reference= only for mean, resample and patch.")
        if self.reference is not None and not len(self.reference):
            raise UsageError(f"ablation {self.kind!r} was given no reference prompts: give at least one.")
        if (self.factor is None) == (self.kind == "scale"):
            raise UsageError(f"{self.kind!r} was given factor={self.factor}: give a factor for scale, and only for it.")

    @property
    def shared(self) -> bool:
        """Whether the intervention is the same for every prompt."""
        return self.kind not in ("resample", "patch")

    def source(self, prompts: Prompts) -> Tensor | None:
        """List the reference prompt that each prompt takes its values from.

        Args:
            prompts: The prompts that run.

        Returns:
            Tensor or None: Int `[p]`; None if prompts take values from no reference prompt, or from all of them.

        Raises:
            PromptError: If "patch" lacks a reference prompt of the same length for each prompt.
        """
        if self.reference is None or self.kind == "mean":
            return None
        if self.kind == "resample":
            generator = torch.Generator("cpu").manual_seed(self.seed)
            return torch.randint(len(self.reference), (len(prompts),), generator=generator, device="cpu")
        if self.reference.lengths != prompts.lengths:
            raise PromptError(
                f"patching pairs each prompt with a reference prompt of the same length: {len(prompts)} prompts of "
                f"{_first_lengths(prompts.lengths)} tokens and {len(self.reference)} reference prompts of "
                f"{_first_lengths(self.reference.lengths)} were given; pair prompts of equal lengths."
            )
        return torch.arange(len(prompts), device="cpu")


def _first_lengths(lengths: tuple[int, ...]) -> str:
    return ", ".join(map(str, lengths[:4])) + (", ..." if len(lengths) > 4 else "")


def _unknown(kind: Any, kinds: tuple[str, ...]) -> str:
    return f"unknown ablation {kind!r}; choose from {', '.join(map(repr, kinds))}."


@contextlib.contextmanager
def ablate(
    model: nn.Module,
    heads: Any,
    kind: AblationKind,
    *,
    reference: Prompts | None = None,
    seed: int = 0,
    outputs: "ReferenceOutputs | None" = None,
) -> Iterator[None]:
    """Replace the outputs of heads while the context is open, in prefill and decode alike.

    | kind | output of a head |
    |---|---|
    | "zero" | `z[b q h] = 0` at the input of the output projection |
    | "mean" | `z[b q h]` = mean of z over all tokens of all reference prompts |
    | "resample" | z of the same head at the same position of a reference prompt, drawn for each row |
    | "uniform" | attention is uniform over the keys that a query sees (logit scale 0) |
    | "first" | all attention is on the first token of the prompt, never on padding |

    Where a "resample" prompt is shorter, z at its last position is used. With "uniform" and "first" a learned sink
    keeps a share of the attention. With "first" the output is 0 where a window no longer reaches the first token.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        heads: Heads to ablate: anything that `HeadSet.parse` takes.
        kind: The kind of ablation.
        reference: Reference prompts; for "mean" and "resample" only.
        seed: Seed of the draws of "resample".
        outputs: Outputs of these heads, or of more, on the reference prompts, where they were read before.

    Yields:
        None: The model is ablated until the context closes.

    Raises:
        HeadError: If the model does not have a head.
        UsageError: If the kind is unknown, or a reference is missing or superfluous.
        ModelError: If the context ends and the model has not run in it, or ran where it cannot be ablated.

    Examples:
        >>> with interp.ablate(model, "L1H2", "zero"), interp.capture(model, interp.keep.z(), heads="L1H2") as cap:
        ...     out = model(**prompts.tensors())
        >>> float(cap[interp.keep.z()].abs().max())
        0.0

    Source:
        "zero" is the usual ablation of causal studies of heads. "uniform" is the masking of the code of Wu et al.
        2404.15574.

    Differs:
        The code of Wu et al. masks decode steps only; here prefill and decode are ablated alike.

    Limits:
        Does not show what a head would do in a model trained without it. "zero" moves the residual stream off its
        distribution.
    """
    if kind not in get_args(AblationKind):
        raise UsageError(_unknown(kind, get_args(AblationKind)))
    intervention = Intervention(kind, reference=reference, seed=seed)
    model = unwrap(model)
    layout = HeadLayout.of(model)
    chosen = HeadSet.parse(heads, layout)
    layout.check(chosen)
    if not len(chosen):
        yield
        return
    bank = ReferenceOutputs.of(model, chosen, intervention) if outputs is None else outputs
    with intervene(model, intervention, [chosen], bank):
        yield


@contextlib.contextmanager
def intervene(
    model: nn.Module,
    intervention: Intervention,
    sets: Sequence[HeadSet],
    bank: "ReferenceOutputs | None" = None,
    source: Tensor | None = None,
) -> Iterator[None]:
    """Apply an intervention to different heads in each row of a batch: row r changes in the heads sets[r % len(sets)].

    The result is exact: each row is what it would be alone.

    Args:
        model: The model.
        intervention: The intervention.
        sets: Head sets; rows cycle through them.
        bank: Outputs of the heads of all sets on the reference prompts, from `ReferenceOutputs.of`.
        source: Int `[p]`, the reference prompt of prompt r // len(sets). Without it, "resample" draws one for each row
            of each run.

    Yields:
        None: The intervention acts until the context closes.

    Raises:
        HeadError: If the model does not have a head.
        ModelError: If a layer of the sets has no attention, or the context ends and the model has not run in it.
        UsageError: If "patch" is given no source, or "scale" is open on this model already.
    """
    model = unwrap(model)
    layout = HeadLayout.of(model)
    masks = head_masks_by_layer(sets, layout)
    if intervention.kind == "patch" and source is None:
        raise UsageError("patching needs the reference prompt of each prompt: give source=, or use sweep_sets.")
    if missing := sorted(set(masks) - set(attention_layers(model))):
        raise ModelError(f"layers {missing} of {type(model).__name__} have no attention: choose heads of other layers.")
    generator = torch.Generator("cpu").manual_seed(intervention.seed)
    tap = InterventionTap(layout, intervention, masks, bank, source, generator)
    acting: list[Scope] = []
    with contextlib.ExitStack() as stack:
        if intervention.kind == "scale":
            # every other kind gives the same outputs when it is applied twice
            remedy = "multiply its factors to apply it twice"
            stack.enter_context(opened_once(model, [(intervention, *sets)], remedy))
        if masks and intervention.kind in ("uniform", "first", "resample", "patch"):
            acting.append(stack.enter_context(tapping(model, tap)).scope_of(tap))
        if masks and intervention.kind not in ("uniform", "first"):
            acting.append(stack.enter_context(projection_inputs(model, masks, tap.replace)))
        yield
    for scope in acting:
        scope.check_reached(masks, f"the ablation {intervention.kind!r}")


@dataclass(eq=False)
class ReferenceOutputs:
    """Outputs of some heads on the reference prompts of an intervention."""

    heads: tuple[Head, ...]
    z: Tensor
    """[n q x d], x in the order of the heads; n and q are 1 for the mean."""
    lengths: Tensor
    """Int [n], the number of tokens of each reference prompt."""

    @classmethod
    @own_defaults()
    def of(
        cls, model: nn.Module, heads: HeadSet, intervention: Intervention, *, progress: bool = False
    ) -> "ReferenceOutputs | None":
        """Read the outputs of heads that an intervention needs.

        Args:
            model: The model.
            heads: The heads.
            intervention: The intervention, with its reference prompts.
            progress: Show a progress bar.

        Returns:
            ReferenceOutputs or None: The outputs; None if the intervention has no reference prompts.
        """
        if intervention.reference is None:
            return None
        reference, order = intervention.reference, tuple(heads)
        longest = max(reference.lengths)
        values, total, count = [], torch.zeros(()), 0
        title = "reference prompts" if progress else None
        for _, cap in read(model, reference, keep.z(), heads=heads, progress=title):
            # [1 x q d] of a single prompt, which has no padding
            z = cap[keep.z()].float()
            if intervention.kind == "mean":
                total, count = total + z.sum((0, 2)), count + z.shape[2]
            else:
                values.append(torch.nn.functional.pad(z[0].transpose(0, 1), (0, 0, 0, 0, 0, longest - z.shape[2])))
        if intervention.kind == "mean":
            return cls(order, (total / count)[None, None], torch.ones(1, dtype=torch.int64))
        return cls(order, torch.stack(values), torch.tensor(reference.lengths))


@dataclass(eq=False)
class InterventionTap(AttentionTap):
    """An intervention, applied to attention calls and to the inputs of output projections."""

    layout: HeadLayout
    intervention: Intervention
    masks: dict[int, Tensor]
    """By layer, Bool [set h]: the heads of each set."""
    bank: ReferenceOutputs | None
    source: Tensor | None
    generator: torch.Generator
    _position: dict[int, Tensor] = field(default_factory=dict)
    _draw: Tensor | None = None

    def at(self, layer: int) -> bool:
        return layer in self.masks

    def edit(self, site: Site) -> Call:
        if self.bank is not None:
            position = site.row_position
            self._position[site.layer] = position.clamp(min=0).cpu()
            again = is_repeating() or bool(site.call.q_start)
            if self.source is None and not again and site.layer == min(self.masks):
                # a new run has other rows, which draw again
                self._draw = torch.randint(len(self.bank.lengths), (len(position),), generator=self.generator)
        call = site.call
        if self.intervention.kind not in ("uniform", "first"):
            return call
        mask = masks_of_rows(self.masks[site.layer], call.q.shape[0]).to(call.q.device)
        if self.intervention.kind == "uniform":
            before = torch.ones((), device=call.q.device) if call.logit_scale is None else call.logit_scale
            return replace(call, logit_scale=torch.where(mask, 0.0, before))
        other = site.key_position != 0
        bias = torch.where(mask[..., None] & other[:, None], -torch.inf, 0.0)
        return replace(call, key_bias=bias if call.key_bias is None else call.key_bias + bias)

    def replace(self, layer: int, x: Tensor) -> Tensor:
        """Replace z of the heads in x [b q h*d], in the rows whose sets have them."""
        z = x.unflatten(-1, (self.layout.heads, -1))
        mask = masks_of_rows(self.masks[layer], len(z)).to(z.device)
        heads = mask.any(0).nonzero()[:, 0].tolist()
        made = z.clone()
        made[:, :, heads] = torch.where(mask[:, None, heads, None], self._value(layer, heads, z), z[:, :, heads])
        return made.flatten(-2)

    def _value(self, layer: int, heads: list[int], z: Tensor) -> Tensor:
        """Values that replace z of some heads of a layer, [b|1 q|1 x d]."""
        if self.intervention.kind == "scale":
            return z[:, :, heads] * float(self.intervention.factor or 0.0)
        if self.bank is None:
            return z.new_zeros(())
        part = [self.bank.heads.index(Head(layer, head)) for head in heads]
        if self.intervention.kind == "mean":
            return self.bank.z[:, :, part].to(z)
        draw = self._draw if self.source is None else self.source.repeat_interleave(len(z) // len(self.source))
        if draw is None:
            raise UsageError("resampling began in the middle of a run: open the context before the prefill.")
        place = torch.minimum(self._position.pop(layer), self.bank.lengths[draw, None] - 1)
        return self.bank.z[draw[:, None, None], place[..., None], torch.tensor(part)].to(z)
