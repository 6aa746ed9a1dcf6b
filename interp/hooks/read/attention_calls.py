"""Reading from the attention calls themselves, for quantities that no reduction of `interp.keep` gives."""

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
    """Base class of taps that store tensors of each layer in `found`, in their `want` or `take`."""

    found: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)
    """Tensors [b h ...] by layer and name."""


def read_attention_calls(
    model: nn.Module,
    prompts: Prompts,
    reader: Callable[[], AttentionCallTap],
    *,
    batch_size: int,
    progress: str | None = None,
) -> dict[str, Tensor]:
    """Run forward passes over prompts in batches and join what a tap stores in each.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: The prompts.
        reader: Function that makes a tap; called once per batch.
        batch_size: Number of prompts per forward pass.
        progress: Title of a progress bar, shown after two seconds; None for no bar.

    Returns:
        dict[str, Tensor]: By name, `[n l h ...]` each.
    """
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
