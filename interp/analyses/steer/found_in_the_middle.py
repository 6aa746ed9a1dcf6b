"""Found in the Middle: attention between documents follows their content, not their position."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.analyses.registry import edit
from interp.analyses.steer.slot_bias import slot_bias
from interp.errors import SpanError, UsageError
from interp.hooks.edit.edit import EditContext, SpanEdit, check_positive, parse_spans
from interp.hooks.prompts.batch_spans import BatchSpans
from interp.hooks.prompts.prompts import Prompts
from interp.kernels.contract import Call

TINY = 1e-30
"""a share of attention that counts as zero"""
DUMMY = "This document is a placeholder and holds no information. "


def _fit(
    model: Any, prompts: Prompts, *, span: Any, heads: str = "all", dummy: str = DUMMY, **fields: Any
) -> "FoundInTheMiddle":
    """An edit whose bias `slot_bias` measures on the prompts, with a dummy text in the place of each document.

    Args:
        dummy: Text that fills the documents, repeated or cut to the length of each.
    """
    spans = parse_spans(span)
    if len(spans) < 2:
        raise UsageError(
            "found_in_the_middle divides attention between documents, but one span is given; name at least two, as in "
            """found_in_the_middle.spans=["first", "second"]."""
        )
    if prompts.tokenizer is None:
        raise UsageError("the prompts have no tokenizer for the dummy documents; encode them with one, or give a bias.")
    ids = prompts.tokenizer(dummy, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UsageError("the dummy document is empty; give a text.")
    bound, width = BatchSpans(prompts), max(prompts.lengths)
    rows = [list(prompt.ids) for prompt in prompts]
    for where in spans:
        for row, inside in zip(rows, bound.mask(where, len(prompts), width), strict=True):
            for number, place in enumerate(inside.nonzero()[:, 0].tolist()):
                row[place] = ids[number % len(ids)]
    items = tuple(replace(prompt, ids=tuple(row), text="") for prompt, row in zip(prompts.items, rows, strict=True))
    return FoundInTheMiddle(spans, slot_bias(model, replace(prompts, items=items), list(spans)), heads=heads, **fields)


@edit(name="found_in_the_middle", title="Found in the Middle", group="spans", order=9, fitted=_fit)
@dataclass(frozen=True, repr=False)
class FoundInTheMiddle(SpanEdit):
    """Attention to documents is calibrated: the bias of each slot is subtracted before the documents share attention.

    In row q after the last document, let m_k be the attention on document k, n_k its number of tokens, and C the sum of
    m over the documents. With `rel_k = m_k / n_k - bias_k` and `a = softmax(rel / temperature)`, document k gets
    `C a_k n_k / (sum over j of a_j n_j)`. This is a bias of `log(that / m_k)` on its keys, at most +-clip, one number
    for each row and document. All other keys keep their attention where nothing is clipped.

    In a steering run without `bias`, it is measured by `slot_bias` on the prompts of the profile split, with a dummy
    text in each document.

    Args:
        spans: The documents, each a name, position or range, in the order of their slots.
        bias: Attention per token of each slot with a dummy document in it, `[k]` or `[l h k]`, from `slot_bias`, or the
            path of a .safetensors file with this one tensor.
        temperature: Temperature of the softmax. The paper uses 5e-5 for attention averaged over layers and heads. Rows
            of single heads vary more, so try decades above.
        clip: Largest bias on a logit; 0 changes nothing.
        heads: Heads to edit. The paper edits the last half of the layers ("L16-L31"), since earlier ones break
            generation.

    Raises:
        UsageError: If a setting is out of range, or the bias does not fit the documents or the model.
        SpanError: While the model runs, if two documents share a token.

    Examples:
        >>> edit = interp.steer.FoundInTheMiddle([(1, 4), (4, 8)], [0.02, 0.01], temperature=0.01)
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        Hsieh et al. 2406.16008, section 4.

    Differs:
        Shares belong to each row and head, and the bias is clipped.

    Limits:
        Does not show that a document is relevant. A head with another task is led to attend to documents too.
    """

    bias: Any
    temperature: float = 5e-5
    clip: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)
        if not 0 <= self.clip < 100:
            raise UsageError(f"clip={self.clip} is not in [0, 100); give the largest bias on a logit, such as 5.")
        given = _table(self.bias)
        if given.dim() not in (1, 3) or given.shape[-1] != len(self.spans) or not bool(given.isfinite().all()):
            raise UsageError(
                f"a bias of shape {list(given.shape)} does not fit {len(self.spans)} documents; "
                "give finite numbers [k] or [l h k]."
            )
        object.__setattr__(self, "bias", _tupled(given.tolist()))

    def __repr__(self) -> str:
        by_head = isinstance(self.bias[0], tuple)
        shown = f"[{len(self.bias)} layers, {len(self.bias[0])} heads]" if by_head else self.bias
        return (
            f"FoundInTheMiddle(heads={self.heads!r}, spans={self.spans!r}, bias={shown}, "
            f"temperature={self.temperature}, clip={self.clip})"
        )

    @property
    def is_noop(self) -> bool:
        # with one document there is nothing to divide
        return self.clip == 0 or len(self.spans) == 1

    def apply(self, here: EditContext) -> Call:
        places = self._documents(here)
        which = torch.arange(1, len(self.spans) + 1, device=places.device)
        last = torch.where(places > 0, torch.arange(places.shape[1], device=places.device), -1).amax(1, keepdim=True)
        rows = here.row_position > last
        if not bool(rows.any()):
            return here.call
        position = here.key_position
        inside = (position >= 0) & (position < places.shape[1])
        number = places.gather(1, position.clamp(0, places.shape[1] - 1)) * inside
        here.warn_outside_window(self.spans, number > 0)
        m = here.masses(number[:, None] == which[:, None])
        tokens = (places[:, None] == which[:, None]).sum(-1)[:, None, None].to(m)
        # a document that a row cannot see gets no share
        seen = m > TINY
        rel = (m / tokens.clamp(min=1) - self._at(here).to(m)) / self.temperature
        a = rel.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) * tokens
        target = a / a.sum(-1, keepdim=True).clamp(min=TINY) * m.sum(-1, keepdim=True)
        bias = torch.log(target / m.clamp(min=TINY)).clamp(-self.clip, self.clip)
        return here.add_row_bias(torch.where(seen & rows[:, None, :, None], bias, 0.0), number)

    def _documents(self, here: EditContext) -> Tensor:
        """Int `[b n]`: the document, from 1, of each position of the prompt, 0 for none; kept for decode steps."""
        found = here.recall()
        if found is None or found.shape[0] != here.call.q.shape[0]:
            inside = torch.stack([here.span_positions((where,)) for where in self.spans], 1).int()
            if int(inside.sum(1).max()) > 1:
                raise SpanError(f"two documents of {self.spans} share a token; name spans that do not overlap.")
            found = inside.mul(torch.arange(1, len(self.spans) + 1, device=inside.device)[:, None]).sum(1)
            here.note(found)
        return found

    def _at(self, here: EditContext) -> Tensor:
        """Float `[k]` or `[h 1 k]`: the bias of one layer, which broadcasts to `[b h q k]`."""
        layer, heads = here.site.layer, here.call.sizes[1]
        if not isinstance(self.bias[0], tuple):
            return torch.tensor(self.bias)
        if layer >= len(self.bias) or len(self.bias[layer]) != heads:
            raise UsageError(
                f"a bias of {len(self.bias)} layers of {len(self.bias[0])} heads does not fit layer {layer} with "
                f"{heads} heads; measure it on this model with slot_bias."
            )
        return torch.tensor(self.bias[layer])[:, None]


def _table(given: Any) -> Tensor:
    """A bias as float32. Raises UsageError for anything but numbers, or a file that holds other than one tensor."""
    if isinstance(given, str | Path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            (given,) = load_file(given).values()
        except (OSError, SafetensorError, ValueError) as error:
            raise UsageError(f"{given} holds no bias ({error}); give a .safetensors file with one tensor.") from None
    try:
        return torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError):
        raise UsageError(f"bias={str(given)[:40]} is not a table of numbers; give [k] or [l h k].") from None


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
