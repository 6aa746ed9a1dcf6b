"""One attention call of a running model, with its place in the model and the text of its rows."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import ModelError
from interp.hooks.model.mask import ComputedMask, DeferredMask
from interp.hooks.model.row_ends import Generation
from interp.hooks.model.row_text import RowText
from interp.kernels.contract import Call


@dataclass(frozen=True, eq=False)
class Site:
    """One attention call and its place in the model."""

    layer: int
    """Layer index, counted from 0."""
    module: nn.Module
    """The self-attention module."""
    known_text: RowText | None
    """The text of each row of the batch; None where the mask does not show it."""
    call: Call
    """The operands of the call."""

    @property
    def text(self) -> RowText:
        """The columns that hold the text of each row, and their positions.

        Raises:
            ModelError: If the mask does not show which keys of a cache are text.
        """
        if self.known_text is None:
            raise ModelError(
                f"the four-dimensional attention mask of layer {self.layer} hides keys of a cache, so interp cannot "
                "tell which of them are padding; pass a two-dimensional attention_mask."
            )
        return self.known_text

    @property
    def first(self) -> Tensor:
        """Int `[b]` column of the first token of each row.

        Raises:
            ModelError: If padding lies between two tokens of a row.
        """
        return self.text.first

    @property
    def row_position(self) -> Tensor:
        """Int `[b q]`, the position of each query in the text of its row; -1 for a query outside of it."""
        return self.text.at(self.call.rows)

    @property
    def key_position(self) -> Tensor:
        """Int `[b k]`, the position of each key in the text of its row; -1 for a key outside of it."""
        start = self.call.k_start
        return self.text.position[:, start : start + self.call.k.shape[2]]

    @cached_property
    def outside(self) -> Tensor | None:
        """Bool `[b q]`, the queries that the model computes although its text has ended; None if there are none."""
        if self.known_text is None or not self.known_text.cut:
            return None
        outside = self.row_position < 0
        if self.call.row_live is not None:
            outside = outside & self.call.row_live
        return outside if bool(outside.any()) else None

    def reading(self, call: Call, counted: Tensor | None = None) -> Call:
        """The call from which reductions are read: queries outside of the text, or not counted, are padding.

        Args:
            call: The call of this site, or a part of it.
            counted: Bool `[b q]`, the queries of each row that count; None for all.
        """
        live = [call.row_live, None if self.outside is None else ~self.outside, counted]
        known = [part for part in live if part is not None]
        return call if len(known) == (call.row_live is not None) else replace(call, row_live=torch.stack(known).all(0))


def make_site(
    module: nn.Module,
    operands: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    kw: dict[str, Any],
    *,
    softcap: float | None,
    generation: Generation,
) -> Site:
    """Translate the arguments of transformers' attention function into a call and its place in the model.

    Args:
        module: The attention module.
        operands: Query `[b h q d]`, key and value `[b g k d]`.
        mask: The mask that arrived.
        kw: Further arguments of the attention function.
        softcap: The soft-cap that the model's own function applies.
        generation: The generate() that runs, if any, in which rows may have ended.

    Returns:
        The site.

    Raises:
        ModelError: If the call has a position bias, a cache argument, or a mask that cannot be interpreted.
    """
    for name in ("position_bias", "cache"):
        if kw.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} passes {name!r} to its attention function, which is not supported; "
                "use a decoder with rotary or learned positions and an ordinary cache."
            )
    query, key, value = operands
    b, n, d = query.shape[0], query.shape[2], query.shape[3]
    layer: Any = module.layer_idx
    causal = kw.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scale = kw.get("scaling")
    call: dict[str, Any] = {
        "scale": d**-0.5 if scale is None else scale,
        "softcap": softcap,
        "sinks": kw.get("s_aux"),
        "causal": causal,
        "q_start": key.shape[2] - n,
    }
    if isinstance(mask, DeferredMask | ComputedMask):
        facts = mask.facts_for(module) if isinstance(mask, DeferredMask) else mask.facts
        dense = facts.dense if isinstance(mask, DeferredMask) else mask.plain
        q_start, k_start, live = facts.start
        key, value = key[:, :, :live], value[:, :, :live]
        text = facts.text(generation.ends(b, q_start + n), query.device)
        call |= {"q_start": q_start, "k_start": k_start}
        call |= {"window": facts.structure[0]} if isinstance(mask, DeferredMask) else {}
        if dense is not None:
            call |= {"causal": False, "mask": dense[..., :live].to(query.device)}
        if facts.padding is not None:
            padding = facts.padding.to(query.device)
            call |= {
                "live": padding[:, k_start : k_start + live],
                "row_live": padding[:, q_start : q_start + n],
            }
    elif mask is not None:
        # a four-dimensional mask from the user is complete, except that it does not show where a static cache ends
        if mask.shape[-1] < key.shape[2] or not _visible(mask[..., key.shape[2] - 1]).any():
            raise ModelError(
                f"the four-dimensional attention mask {list(mask.shape)} hides the last of {key.shape[2]} keys "
                "from every query, as happens with a static cache; pass a two-dimensional attention_mask, or use "
                "a dynamic cache."
            )
        call |= {"causal": False, "mask": mask[..., : key.shape[2]]}
        text = _dense_text(call["mask"], b, call["q_start"], generation.ends(b, key.shape[2]))
    else:
        text, ends = RowText.unpadded(b, key.shape[2], query.device), generation.ends(b, key.shape[2])
        text = text if ends is None else text.until(ends)
    return Site(int(layer), module, text, Call(query, key, value, **call))


def _visible(mask: Tensor) -> Tensor:
    """Where a mask, of truth values or added to logits, lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


def _dense_text(mask: Tensor, batch: int, q_start: int, ends: Tensor | None) -> RowText | None:
    """The text of each row by a mask [b|1 1|h q k], where a token of it sees itself; None where that is not known."""
    seen = _visible(mask)
    if q_start:
        # a key that no query sees is padding, or one that the mask hides for another reason
        live = torch.ones_like(seen[:, 0, 0]) if bool(seen.any(-2).all()) else None
    else:
        live = seen.diagonal(dim1=-2, dim2=-1).any(1)
    if live is None:
        return None
    text = (
        RowText.unpadded(batch, live.shape[1], live.device) if bool(live.all()) else RowText.of(live.expand(batch, -1))
    )
    return text if ends is None else text.until(ends)
