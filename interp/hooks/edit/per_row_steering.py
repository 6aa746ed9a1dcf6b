"""Steering with a different head set in each row of a batch, so that one forward pass tests many head sets."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, Edits, Steering
from interp.hooks.edit.open_edits import opened_once
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
    """Apply edits to different heads in each row of a batch.

    Row r of a forward pass holds prompt r // len(sets) and is steered in the heads sets[r % len(sets)], which replace
    the heads of the edits. The result is exact: each row is what it would be alone with those heads.

    Args:
        model: The model.
        edits: Edits of attention.
        prompts: The prompts, each of which has len(sets) rows of the batch.
        sets: Head sets.

    Yields:
        RowSteering: The edits, bound to the model and the batch.

    Raises:
        UsageError: If an edit is not a bias on attention logits, or is open on this model already.
        HeadError: If the model does not have a head.

    Examples:
        >>> from interp.hooks.edit.per_row_steering import steering_rows
        >>> sets = [interp.HeadSet.parse("L0H1"), interp.HeadSet.parse("L1H2")]
        >>> inputs = {name: x.repeat_interleave(2, 0) for name, x in prompts.tensors().items()}
        >>> with torch.no_grad(), steering_rows(model, interp.steer.Boost("first", 3.0), prompts, sets):
        ...     logits = model(**inputs).logits
        >>> bool((logits[0] == logits[1]).all())
        False
    """
    model = unwrap(model)
    layout = HeadLayout.of(model)
    united = HeadSet(tuple(sorted({head for heads in sets for head in heads})))
    for edit in Edits(()) + edits:
        if edit.gate is not None:
            raise UsageError(
                f"{type(edit).__name__} is not a bias on attention logits, so the rows of a batch cannot differ in it: "
                "steer one head set at a time."
            )
    chosen = Edits(tuple(replace(edit, heads=str(united)) for edit in Edits(()) + edits))
    masks = head_masks_by_layer(sets, layout)
    steering = RowSteering(layout=layout, edits=chosen, bound=BatchSpans(prompts), masks=masks)
    with contextlib.ExitStack() as stack:
        acting = [(edit, *sets) for edit in chosen if masks and not edit.is_noop]
        stack.enter_context(opened_once(model, acting, "give edit + edit to apply it twice"))
        if masks:
            steering.seam = stack.enter_context(tapping(model, steering))
        yield steering


def head_masks_by_layer(sets: Sequence[HeadSet], layout: HeadLayout) -> dict[int, Tensor]:
    """Mark the heads of each set, by layer.

    Args:
        sets: Head sets.
        layout: The heads of the model.

    Returns:
        dict[int, Tensor]: Bool `[set h]` for each layer that some set names.

    Raises:
        HeadError: If the model does not have a head.
    """
    masks: dict[int, Tensor] = {}
    for number, heads in enumerate(sets):
        layout.check(heads)
        for head in heads:
            empty = torch.zeros(len(sets), layout.heads, dtype=torch.bool, device="cpu")
            masks.setdefault(head.layer, empty)[number, head.head] = True
    return dict(sorted(masks.items()))


def masks_of_rows(masks: Tensor, rows: int) -> Tensor:
    """Bool [b h], the heads of each row of a batch from those of each set [set h]: row r has set r % sets."""
    return masks.repeat(rows // len(masks), 1)


@dataclass(eq=False, kw_only=True)
class RowSteering(Steering):
    """Edits whose heads differ by row; made by `steering_rows`."""

    masks: dict[int, Tensor] = field(default_factory=dict)
    """By layer, Bool [set h]: the heads of each set."""
    copies: int = 1
    """Number of rows that follow from one row of the prompt, as its continuations do."""

    def repeat(self, copies: int) -> None:
        """Expect `copies` rows, next to each other, for each row so far; notes of the edits are repeated."""
        self.copies *= copies
        repeat_notes(self, copies)

    def edit(self, site: Site) -> Call:
        masks = self.masks.get(site.layer)
        if masks is None:
            return site.call
        rows = site.call.q.shape[0]
        chosen = masks_of_rows(masks, rows // self.copies).repeat_interleave(self.copies, 0)
        return merge_calls(site.call, super().edit(site), chosen.to(site.call.q.device))


def repeat_notes(steering: Steering, copies: int) -> None:
    """Repeat what edits noted of each row of a batch, for `copies` rows in its place."""
    for key, value in steering.memory.items():
        if isinstance(value, Tensor):
            steering.memory[key] = value.repeat_interleave(copies, 0)


def merge_calls(before: Call, after: Call, chosen: Tensor) -> Call:
    """Take biases and scales from the call `after` an edit for the chosen rows and heads, and from `before` elsewhere.

    Args:
        before: The call before the edit.
        after: The call after the edit.
        chosen: Bool `[b h]`.

    Returns:
        Call: The merged call.

    Raises:
        UsageError: If the edit changed anything but biases and scales of logits.
    """
    merged = ("key_bias", "row_coef", "key_group", "logit_scale")
    others = {name: getattr(before, name) for name in before.__dataclass_fields__ if name not in merged}
    if before.row_coef is not None or any(getattr(after, name) is not value for name, value in others.items()):
        raise UsageError(
            "this edit is not a bias or scale of logits, so the rows of a batch cannot differ in it: "
            "steer one head set at a time."
        )
    changed = {}
    if after.key_bias is not None:
        old = torch.zeros((), device=chosen.device) if before.key_bias is None else before.key_bias
        changed["key_bias"] = torch.where(chosen[..., None], after.key_bias, old)
    if after.row_coef is not None:
        row_coef = torch.where(chosen[..., None, None], after.row_coef, 0.0)
        changed |= {"row_coef": row_coef, "key_group": after.key_group}
    if after.logit_scale is not None:
        old = torch.ones((), device=chosen.device) if before.logit_scale is None else before.logit_scale
        changed["logit_scale"] = torch.where(chosen, after.logit_scale, old).expand(chosen.shape)
    return replace(before, **changed)
