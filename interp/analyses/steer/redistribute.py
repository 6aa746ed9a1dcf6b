"""Redistribution: heads that attend to a span move the attention on their sinks to it."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from interp.analyses.registry import edit
from interp.analyses.steer._sinks import Threshold, between, check_skipped, limit, sinks
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext, SpanEdit, parse_spans
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.kernels.contract import Call

TINY = 1e-6
"""a share of attention too small to compute proportions from"""


@edit(title="Redistribution", group="spans", order=8)
@dataclass(frozen=True)
class Redistribute(SpanEdit):
    """Attention on sinks is moved to the spans, in the rows and heads that attend to the spans already.

    In row q of head h, after the last token of the spans, let s be the attention on sinks, m the attention on the
    spans, and v the attention on the keys of the spans that are not sinks. Where `m >= least` and `v / m >= share`, the
    new pattern is

    - `keep pattern` on sinks,
    - `(1 + W / v) pattern` on the other keys of the spans, with `W = (1 - keep) s`,
    - `pattern` elsewhere, so that the sum of the row does not change.

    This is a bias of `log keep` on sinks and of `log(1 + W / v)` on the spans: two sets of keys, one number for each
    row.

    Args:
        spans: Names, positions or ranges of the spans.
        keep: Share of their attention that sinks keep, in [0, 1]; 0 hides them, and 1 changes nothing. The released
            code uses 0.6; the paper calls 1 - keep p.
        least: Least attention m on the spans, 0.2 in the released code.
        share: Least share v / m, 0.5 in the released code; the paper uses 0.5 to 0.9 by task.
        sinks: Spans or positions that are sinks. None for the first token and the sinks of `Act`, which are found once
            on the prompt, in one prefill.
        threshold: As in `Act`.
        skip_first: Number of first layers whose heads are not edited; the paper leaves out 2.
        skip_last: Number of last layers whose heads are not edited; the paper leaves out 1.
        heads: Heads to edit.

    Raises:
        UsageError: If a setting is out of range.

    Examples:
        >>> edit = interp.steer.Redistribute("first", least=0.1, sinks=0)
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        VAR, Kang et al. 2503.03321.

    Differs:
        The spans are text, where the paper has the image. Sinks come from the columns of each head, where the paper
        uses large hidden dimensions, which are the same for all heads of a layer. Sinks need not lie in the spans. No
        layer is left out by default.

    Limits:
        Does not show that the sinks were idle, nor that the meaning of the span is used.
    """

    keep: float = 0.6
    least: float = 0.2
    share: float = 0.5
    sinks: Any = None
    threshold: Threshold = "5/n"
    skip_first: int = 0
    skip_last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.keep <= 1:
            raise UsageError(f"keep={self.keep} is not in [0, 1]; give the share that sinks keep, such as 0.6.")
        for name, value in (("least", self.least), ("share", self.share)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name}={value} is not in [0, 1]; give a share of attention.")
        limit(self.threshold, torch.ones(1))
        check_skipped(skip_first=self.skip_first, skip_last=self.skip_last)
        if self.sinks is not None:
            object.__setattr__(self, "sinks", parse_spans(self.sinks))

    @property
    def is_noop(self) -> bool:
        return self.keep == 1

    def chosen(self, layout: HeadLayout) -> HeadSet:
        return between(super().chosen(layout), layout, self.skip_first, self.skip_last)

    def apply(self, here: EditContext) -> Call:
        span = here.keys(self.spans) & here.prompt_keys()
        if self.sinks is None:
            drained = sinks(here, self.threshold) | (here.first_token[:, None] & here.head_mask[:, None])
        else:
            drained = here.keys(self.sinks) & here.prompt_keys()
        rows = here.rows_after(self.spans)
        if not bool(rows.any() & span.any()):
            return here.call
        marked = span if drained.dim() == 2 else span[:, None]
        sets = torch.broadcast_tensors(drained, marked & ~drained, marked & drained)
        s, v, both = here.masses(torch.stack(sets, -2)).unbind(-1)
        m = v + both
        chosen = rows[:, None] & (m >= self.least) & (v >= self.share * m) & (v > TINY)
        given = torch.log1p((1 - self.keep) * s / v.clamp(min=TINY))
        coefficient = torch.stack([torch.full_like(s, math.log(self.keep) if self.keep else -math.inf), given], -1)
        group = drained.int() + 2 * (marked & ~drained).int()
        return here.add_row_bias(torch.where(chosen[..., None], coefficient, 0.0), group)
