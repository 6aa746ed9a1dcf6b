"""Steering in which the rows of a batch have head sets of their own: many interventions in one forward."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, Edits, Steering
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import unwrap
from interp.hooks.prompts.batch_spans import BatchSpans
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.seam import Site, tapping
from interp.kernels.contract import Call


@contextlib.contextmanager
def steering_rows(
    model: nn.Module, edits: Edit | Edits, prompts: Prompts, sets: Sequence[HeadSet]
) -> Iterator["RowSteering"]:
    """Let edits act on other heads in each row of a batch.

    Row r of a forward holds prompt r // len(sets) and is steered in the heads sets[r % len(sets)], which take the
    place of the edits' own. Exact: a row is what it would be alone under those heads.
    Raises UsageError for edits that are no bias of attention, HeadError for heads the model does not have.
    """
    model = unwrap(model)
    layout = HeadLayout.of(model)
    united = HeadSet(tuple(sorted({head for heads in sets for head in heads})))
    for edit in Edits(()) + edits:
        if edit.gate is not None:
            raise UsageError(f"{type(edit).__name__} is no bias of attention: rows of a batch cannot differ in it.")
    chosen = Edits(tuple(replace(edit, heads=str(united)) for edit in Edits(()) + edits))
    own = own_by_layer(sets, layout)
    steering = RowSteering(layout=layout, edits=chosen, bound=BatchSpans(prompts), own=own)
    with contextlib.ExitStack() as stack:
        if own:
            steering.seam = stack.enter_context(tapping(model, steering))
        yield steering


def own_by_layer(sets: Sequence[HeadSet], layout: HeadLayout) -> dict[int, Tensor]:
    """Bool [set h] for each layer that some set names: the heads of each set. Raises HeadError."""
    own: dict[int, Tensor] = {}
    for number, heads in enumerate(sets):
        layout.check(heads)
        for head in heads:
            own.setdefault(head.layer, torch.zeros(len(sets), layout.heads, dtype=torch.bool))[number, head.head] = True
    return dict(sorted(own.items()))


def own_rows(own: Tensor, rows: int) -> Tensor:
    """Bool [b h] from [set h] for the rows of a batch, whose row r has the heads of set r % sets."""
    return own.repeat(rows // len(own), 1)


@dataclass(eq=False, kw_only=True)
class RowSteering(Steering):
    """Edits whose heads differ by row."""

    own: dict[int, Tensor] = field(default_factory=dict)
    """by layer, Bool [set h]"""
    copies: int = 1
    """rows that follow from one of the prompt's rows, as its continuations do"""

    def repeat(self, copies: int) -> None:
        """From now on each row comes `copies` times, those of one row side by side; what edits noted is repeated."""
        self.copies *= copies
        repeat_notes(self, copies)

    def edit(self, site: Site) -> Call:
        own = self.own.get(site.layer)
        if own is None:
            return site.call
        rows = site.call.q.shape[0]
        own = own_rows(own, rows // self.copies).repeat_interleave(self.copies, 0)
        return only(site.call, super().edit(site), own.to(site.call.q.device))


def repeat_notes(steering: Steering, copies: int) -> None:
    """Let what edits noted of each row of a batch hold for `copies` rows in its place."""
    for key, value in steering.memory.items():
        if isinstance(value, Tensor):
            steering.memory[key] = value.repeat_interleave(copies, 0)


def only(before: Call, after: Call, own: Tensor) -> Call:
    """The call `after` an edit for the rows and heads that are `own` [b h], `before` for all others.

    Raises UsageError where the edit changed anything but biases and scales of logits.
    """
    named = ("key_bias", "row_coef", "key_group", "logit_scale")
    others = {name: getattr(before, name) for name in before.__dataclass_fields__ if name not in named}
    if before.row_coef is not None or any(getattr(after, name) is not value for name, value in others.items()):
        raise UsageError("this edit is no bias or scale of logits: rows of a batch cannot differ in it.")
    changed = {}
    if after.key_bias is not None:
        held = torch.zeros((), device=own.device) if before.key_bias is None else before.key_bias
        changed["key_bias"] = torch.where(own[..., None], after.key_bias, held)
    if after.row_coef is not None:
        changed |= {"row_coef": torch.where(own[..., None, None], after.row_coef, 0.0), "key_group": after.key_group}
    if after.logit_scale is not None:
        held = torch.ones((), device=own.device) if before.logit_scale is None else before.logit_scale
        changed["logit_scale"] = torch.where(own, after.logit_scale, held).expand(own.shape)
    return replace(before, **changed)
