"""Reading attention at the last token of prompts."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import Keep

LAST = "last token"
"""name of the span that marks it"""


def at_last(
    model: nn.Module, prompts: Prompts, keep: Keep, *, batch_size: int = 8, progress: str | None = None
) -> Float[Tensor, "n l h ..."]:
    """The result of `keep` at the last token of each prompt, without the axis of queries.

    Args:
        model: A transformers causal language model.
        prompts: Prompts to read.
        keep: What to keep; its result may be one number or a row for each query.
        batch_size: Number of prompts per forward pass.
        progress: Title of a progress bar; None for no bar.
    """
    found = last_rows(model, prompts, keep, batch_size=batch_size, progress=progress)
    return torch.cat([rows for _, rows in found])


def last_rows(
    model: nn.Module, prompts: Prompts, keep: Keep, *, batch_size: int = 8, progress: str | None = None
) -> Iterator[tuple[Prompts, Float[Tensor, "b l h ..."]]]:
    """The same as `at_last`, batch by batch, for results as wide as the prompts of their batch."""
    marked = tuple(
        replace(prompt, spans={**prompt.spans, LAST: ((len(prompt) - 1, len(prompt)),)}) for prompt in prompts
    )
    chosen = read(model, replace(prompts, items=marked), keep, queries=LAST, batch_size=batch_size, progress=progress)
    for batch, cap in chosen:
        yield batch, cap[keep][:, :, :, 0].float()
