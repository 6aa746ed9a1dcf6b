"""What heads do at the last token of prompts."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import Keep

LAST = "last token"
"""the span that marks it"""


def at_last(
    model: nn.Module, prompts: Prompts, keep: Keep, *, batch_size: int = 8, progress: str | None = None
) -> Float[Tensor, "n l h ..."]:
    """What `keep` gives for the last token of each prompt, without the axis of queries: one number, or a row of them.

    progress: title of a bar.
    """
    found = last_rows(model, prompts, keep, batch_size=batch_size, progress=progress)
    return torch.cat([rows for _, rows in found])


def last_rows(
    model: nn.Module, prompts: Prompts, keep: Keep, *, batch_size: int = 8, progress: str | None = None
) -> Iterator[tuple[Prompts, Float[Tensor, "b l h ..."]]]:
    """The same batch by batch, for what is as wide as the prompts of its batch."""
    marked = tuple(
        replace(prompt, spans={**prompt.spans, LAST: ((len(prompt) - 1, len(prompt)),)}) for prompt in prompts
    )
    chosen = read(model, replace(prompts, items=marked), keep, queries=LAST, batch_size=batch_size, progress=progress)
    for batch, cap in chosen:
        yield batch, cap[keep][:, :, :, 0].float()
