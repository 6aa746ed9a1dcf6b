"""Reading attention at the last token of prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import Keep
from interp.hooks.read.visibility import Visibility, keys_from
from interp.hooks.seam import tapping

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
    return torch.cat([rows for _, rows, _ in found])


def last_rows(
    model: nn.Module,
    prompts: Prompts,
    keep: Keep,
    *,
    keys: Callable[[Prompt], Sequence[int]] = lambda prompt: (0,),
    batch_size: int = 8,
    progress: str | None = None,
) -> Iterator[tuple[Prompts, Float[Tensor, "b l h ..."], Bool[Tensor, "b l h x"]]]:
    """The same as `at_last`, batch by batch, for results as wide as the prompts of their batch.

    Last comes whether a head can see each of the `keys` of a prompt from its last token.
    """
    marked = tuple(
        replace(prompt, spans={**prompt.spans, LAST: ((len(prompt) - 1, len(prompt)),)}) for prompt in prompts
    )
    sight = Visibility()

    def kept(batch: Prompts) -> Keep:
        sight.start(keys_from([len(prompt) - 1 for prompt in batch], [keys(prompt) for prompt in batch]))
        return keep

    marks = replace(prompts, items=marked)
    with tapping(model, sight):
        for batch, cap in read(model, marks, kept, queries=LAST, batch_size=batch_size, progress=progress):
            yield batch, cap[keep][:, :, :, 0].float(), sight.seen
