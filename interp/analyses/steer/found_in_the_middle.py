"""Found in the Middle: attention between documents by what they say, and not by the slot that they stand in."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.errors import SpanError, UsageError
from interp.hooks.edit.edit import EditContext, SpanEdit, check_positive
from interp.kernels.contract import Call

TINY = 1e-30
"""a share of attention that is as good as none"""


@dataclass(frozen=True, repr=False)
class FoundInTheMiddle(SpanEdit):
    """Attention on documents calibrated: what a slot gets whatever stands there is taken off before they share.

    spans: the documents, each a name, in the order of their slots. In row q past the last document, with m_k the
    attention on document k, n_k its tokens and C the sum of m: rel_k = m_k / n_k - bias_k, a = softmax(rel /
    temperature), and document k gets C a_k n_k / (sum of a n): a bias of log(that / m_k) on its keys, at most +-clip, a
    number for each row and document. All other keys keep their attention where nothing is clipped.
    bias: attention per token of each slot with a dummy document in it, [k] or [l h k], from `slot_bias`; temperature
    5e-5 in the paper, for attention averaged over layers and heads: rows of single heads vary more, try decades above;
    clip 5, 0 changes nothing; heads: the last half of the layers there ("L16-L31"), earlier ones break generation.
    Source: Hsieh et al. 2406.16008, section 4. Differs: shares of each row and head; the clip.
    Cannot show: that a document is relevant; a head with another task is led to look at documents too.
    """

    bias: Any
    temperature: float = 5e-5
    clip: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)
        if not 0 <= self.clip < 100:
            raise UsageError(f"clip={self.clip} is not in [0, 100): it bounds a bias on logits, 0 changes nothing.")
        try:
            given = torch.as_tensor(self.bias, dtype=torch.float32)
        except (TypeError, ValueError):
            raise UsageError(f"bias={str(self.bias)[:40]} is no table of numbers: give [k] or [l h k].") from None
        if given.dim() not in (1, 3) or given.shape[-1] != len(self.spans) or not bool(given.isfinite().all()):
            raise UsageError(
                f"bias of shape {list(given.shape)} does not fit {len(self.spans)} documents: "
                "give finite numbers, [k] or [l h k]."
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
        return self.clip == 0

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
        # a document that a row cannot see has no share to get
        seen = m > TINY
        rel = (m / tokens.clamp(min=1) - self._at(here).to(m)) / self.temperature
        a = rel.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) * tokens
        target = a / a.sum(-1, keepdim=True).clamp(min=TINY) * m.sum(-1, keepdim=True)
        bias = torch.log(target / m.clamp(min=TINY)).clamp(-self.clip, self.clip)
        return here.add_row_bias(torch.where(seen & rows[:, None, :, None], bias, 0.0), number)

    def _documents(self, here: EditContext) -> Tensor:
        """Int [b n] the document, from 1, that each position of the prompt is in; 0 for none. Kept for later steps."""
        found = here.recall()
        if found is None or found.shape[0] != here.call.q.shape[0]:
            inside = torch.stack([here.span_positions((where,)) for where in self.spans], 1).int()
            if int(inside.sum(1).max()) > 1:
                raise SpanError(f"two documents of {self.spans} share a token: name spans that do not overlap.")
            found = inside.mul(torch.arange(1, len(self.spans) + 1, device=inside.device)[:, None]).sum(1)
            here.note(found)
        return found

    def _at(self, here: EditContext) -> Tensor:
        """Float [k] or [h 1 k], which broadcast to [b h q k]."""
        layer, heads = here.site.layer, here.call.sizes[1]
        if not isinstance(self.bias[0], tuple):
            return torch.tensor(self.bias)
        if layer >= len(self.bias) or len(self.bias[layer]) != heads:
            raise UsageError(
                f"a bias of {len(self.bias)} layers of {len(self.bias[0])} heads has nothing for layer {layer} with "
                f"{heads} heads: measure it on this model with slot_bias."
            )
        return torch.tensor(self.bias[layer])[:, None]


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
