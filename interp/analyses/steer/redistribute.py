"""Redistribution: heads that look at a span give it what their sinks hold."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from interp.analyses.steer._sinks import Threshold, limit, sinks
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext, SpanEdit, parse_spans
from interp.kernels.contract import Call

TINY = 1e-6
"""a share of attention that proportions cannot be read from"""


@dataclass(frozen=True)
class Redistribute(SpanEdit):
    """Attention on sinks moved to the spans, in the rows and heads that look at the spans already.

    In row q of head h, past the last token of the spans: s = attention on sinks, m = on the spans, v = on the spans'
    keys that are no sinks. Where m >= least and v / m >= share: pattern' = keep pattern on sinks,
    (1 + W / v) pattern on the spans' other keys with W = (1 - keep) s, pattern elsewhere; the row sums to what it did.
    A bias of log keep and of log(1 + W / v): two sets of keys, a number for each row.
    keep 0.6, least 0.2, share 0.5 in the code (the paper calls 1 - keep p, and takes share 0.5 to 0.9 by task); keep 1
    changes nothing. sinks: spans or positions; None for the first token and ACT's sinks, above `threshold`, found once
    on the prompt, in one prefill. heads: not those of the first two layers and the last in the paper.
    Source: VAR, Kang et al. 2503.03321. Differs: spans of text where it has the image; sinks by the columns of each
    head, where it takes large hidden dimensions, the same for all heads of a layer; no sink has to lie in the spans.
    Cannot show: that the sinks were idle, nor that the span was read for what it says.
    """

    keep: float = 0.6
    least: float = 0.2
    share: float = 0.5
    sinks: Any = None
    threshold: Threshold = "5/n"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise UsageError(f"keep={self.keep} is not in (0, 1]: it is what sinks keep of theirs, 1 changes nothing.")
        for name, value in (("least", self.least), ("share", self.share)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name}={value} is not in [0, 1]: it is a share of attention.")
        limit(self.threshold, torch.ones(1))
        if self.sinks is not None:
            object.__setattr__(self, "sinks", parse_spans(self.sinks))

    @property
    def is_noop(self) -> bool:
        return self.keep == 1

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
        both = drained & marked
        s, m = here.mass(drained)[0], here.mass(span)[0]
        v = m - here.mass(both)[0] if bool(both.any()) else m
        # v is a difference: where nothing is left of it there is no proportion to go by
        chosen = rows[:, None] & (m >= self.least) & (v >= self.share * m) & (v > TINY)
        given = torch.log1p((1 - self.keep) * s / v.clamp(min=TINY))
        coefficient = torch.stack([torch.full_like(s, math.log(self.keep)), given], -1)
        group = drained.int() + 2 * (marked & ~drained).int()
        return here.add_row_bias(torch.where(chosen[..., None], coefficient, 0.0), group)
