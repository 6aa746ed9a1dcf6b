"""Reading what no keep gives: from the attention calls themselves, as they pass the seam."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.hooks.model.layers import attention_layers
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import run
from interp.hooks.seam import AttentionTap, tapping


@dataclass(eq=False)
class AttentionCallTap(AttentionTap):
    """A tap that notes something of each layer: fill `found` in `want` or in `take`."""

    found: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)
    """by layer, [b h ...] each"""


def read_attention_calls(
    model: nn.Module,
    prompts: Prompts,
    reader: Callable[[], AttentionCallTap],
    *,
    batch_size: int,
    progress: str | None = None,
) -> dict[str, Tensor]:
    """What a reader of its own noted of each batch of prompts, [n l h ...] each. progress: title of a bar."""
    parts: dict[str, list[Tensor]] = {}
    batches = list(prompts.batches(batch_size))
    for batch in tqdm(batches, desc=progress, disable=progress is None, delay=2, leave=False):
        tap = reader()
        with tapping(model, tap):
            run(model, batch, logits_to_keep=1)
        layers = [tap.found[layer] for layer in attention_layers(model)]
        for name in layers[0]:
            parts.setdefault(name, []).append(torch.stack([layer[name] for layer in layers], 1))
    return {name: torch.cat(found) for name, found in parts.items()}
