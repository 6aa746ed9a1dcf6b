"""The position bias of documents, which Found in the Middle subtracts."""

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
    """Measure the attention that each slot of a document gets whatever text it holds.

    `bias[l h k]` is the mean over prompts n, and over their rows q after the last document, of `(sum over the keys of
    document k of pattern[n l h q key]) / tokens of document k`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts like those to be steered, with a dummy document (the same text) in each slot.
        documents: Names, positions or ranges of the slots, in order.
        batch_size: Number of prompts per forward pass.

    Returns:
        Float `[l h k]`: attention per token of each slot, for `FoundInTheMiddle`.

    Raises:
        SpanError: If a prompt has no token after the last document.

    Examples:
        >>> interp.steer.slot_bias(model, prompts, [(1, 4), (4, 8)]).shape
        torch.Size([2, 4, 2])

    Source:
        Hsieh et al. 2406.16008.

    Differs:
        All slots hold the dummy at once. The paper places one dummy at a time.

    Limits:
        Does not show a bias that depends on the text of other slots.
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
                f"a prompt has no token after the last of {', '.join(map(str, spans))}; let it end with the question."
            )
        start = int(last.min()) + 1
        with capture(model, keep, batch, queries=slice(start, None)) as cap:
            run(model, batch, logits_to_keep=1)
        rows = cap.queries > last[:, None]
        share = cap[keep].nan_to_num(0.0) * rows[:, None, None, :, None]
        found.append(share.sum(3) / rows.sum(1)[:, None, None, None] / inside.sum(-1)[:, None, None])
    return torch.cat(found).mean(0)
