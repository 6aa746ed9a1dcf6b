"""What documents get by the slot that they stand in: the bias that Found in the Middle takes off."""

from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import SpanError
from interp.hooks.edit.edit import parse_spans
from interp.hooks.prompts.batch_spans import BatchSpans
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import capture, run
from interp.hooks.read.keep import mass


def slot_bias(model: nn.Module, prompts: Prompts, documents: Any, *, batch_size: int = 1) -> Tensor:
    """What each slot gets by where it is: attention per token on each document, Float [l h k].

    bias[l h k] = mean over prompts, and over their rows past the last document, of (sum over the keys of document k of
    pattern[b l h q key]) / tokens of document k. prompts: as those to be steered, with a dummy document (the same text)
    in each slot; documents: the names of the slots, in order. Raises SpanError for a prompt without such rows.
    Source: Hsieh et al. 2406.16008. Differs: the paper places one dummy at a time.
    Cannot show: a bias that depends on what stands in other slots.
    """
    spans = parse_spans(documents)
    keep, found = mass(*spans), []
    for batch in prompts.batches(batch_size):
        bound, width = BatchSpans(batch), max(batch.lengths)
        real = torch.arange(width) < torch.tensor(batch.lengths)[:, None]
        inside = torch.stack([bound.mask(where, len(batch), width) for where in spans], 1) & real[:, None]
        last = (inside.any(1) * torch.arange(width)).amax(1)
        if bool((last + 1 >= torch.tensor(batch.lengths)).any()) or not bool(inside.any(-1).all()):
            raise SpanError(
                f"a prompt has no token past the last of {', '.join(map(str, spans))}: end with the question."
            )
        start = int(last.min()) + 1
        with capture(model, keep, batch, queries=slice(start, None)) as cap:
            run(model, batch, logits_to_keep=1)
        rows = cap.queries > last[:, None]
        share = cap[keep].nan_to_num(0.0) * rows[:, None, None, :, None]
        found.append(share.sum(3) / rows.sum(1)[:, None, None, None] / inside.sum(-1)[:, None, None])
    return torch.cat(found).mean(0)
