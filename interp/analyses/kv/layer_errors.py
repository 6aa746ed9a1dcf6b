"""Errors of each layer when keys are dropped: weights for budgets that differ by layer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.identify.task_kv import output_weights
from interp.analyses.kv.selector import KeySelector
from interp.errors import UsageError
from interp.hooks.edit.edit import Edits, Steering
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import unwrap
from interp.hooks.model.weights import input_device
from interp.hooks.prompts.batch_spans import BatchSpans
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.seam import Site, tapping
from interp.kernels.contract import Call
from interp.kernels.select import select


@torch.no_grad()
def layer_errors(
    model: nn.Module,
    prompts: Prompts,
    selector: KeySelector,
    *,
    max_new_tokens: int = 8,
    batch_size: int = 4,
    progress: bool = False,
) -> tuple[float, ...]:
    """Measure the error that dropping keys causes in each layer alone: weights for `CompressKV(layer_weights=...)`.

    `error[l] = |o - o'| / |o|` by the Frobenius norm, where `o[b q m]` is the output of the attention block at the rows
    of a reply with every key, and o' with the kept keys and the same input. It is averaged over batches of prompts and
    divided by its sum over layers. The reply is generated greedily, with every key.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts to continue.
        selector: A selector that drops keys, such as a CompressKV with equal layers.
        max_new_tokens: Length of the replies.
        batch_size: Number of prompts per forward pass.
        progress: Show a progress bar.

    Returns:
        One weight for each layer; their sum is 1.

    Raises:
        UsageError: For a selector that keeps everything, replies of no tokens, or where no layer dropped a key.

    Examples:
        >>> from interp.analyses.kv import SnapKV, layer_errors
        >>> selector = SnapKV(0.4, n_sink=1, n_recent=2, window=4)
        >>> len(layer_errors(model, prompts, selector, max_new_tokens=1))
        2

    Source:
        CompressKV, 2508.02401 (offline eviction error by layer).

    Differs:
        The error is relative to the layer's own output, since norms grow with depth. The bias of the output projection
        is left out.

    Limits:
        Does not show errors that add up over layers.
    """
    if selector.is_noop or max_new_tokens < 1:
        raise UsageError(
            f"keep_ratio={selector.keep_ratio}, max_new_tokens={max_new_tokens}; give a ratio below 1, and "
            "at least 1 token."
        )
    network: Any = unwrap(model)
    layout = HeadLayout.of(network)
    found = []
    bar = tqdm(list(prompts.batches(batch_size)), desc="layer errors", disable=not progress, delay=2, leave=False)
    for batch in bar:
        read = _Errors(layout=layout, edits=Edits((selector,)), bound=BatchSpans(batch))
        with tapping(network, read):
            inputs = batch.tensors(device=input_device(network))
            network.generate(
                **inputs, max_new_tokens=max_new_tokens + 1, min_new_tokens=max_new_tokens + 1, do_sample=False
            )
        # a layer that dropped nothing has no error
        sums = [read.sums.get(layer, (0.0, 1.0)) for layer in range(layout.layers)]
        found.append([(lost / whole) ** 0.5 for lost, whole in sums])
    mean = torch.tensor(found, dtype=torch.float64).mean(0)
    if not float(mean.sum()):
        raise UsageError("no layer dropped a key; give longer prompts, or a smaller keep_ratio.")
    return tuple((mean / mean.sum()).tolist())


@dataclass(eq=False, kw_only=True)
class _Errors(Steering):
    """Measures the change that a selector would make, without making it."""

    sums: dict[int, tuple[float, float]] = field(default_factory=dict)
    """by layer, squared norms of the error and of the output"""

    def edit(self, site: Site) -> Call:
        call = super().edit(site)
        if call is not site.call:
            weights = output_weights(site.module, call.sizes[1], call.v)
            written = [torch.einsum("bhqd,hdm->bqm", _z(x), weights.float()) for x in (site.call, call)]
            lost, whole = self.sums.get(site.layer, (0.0, 0.0))
            lost += float((written[0] - written[1]).square().sum())
            self.sums[site.layer] = lost, whole + float(written[0].square().sum())
        return site.call


def _z(call: Call) -> Float[Tensor, "b h q d"]:
    out: Any = select(call, ()).engine(call, (), out=True).out
    return out.float()
