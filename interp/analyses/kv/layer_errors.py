"""What dropping keys costs each layer: weights for budgets that differ by layer."""

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
    """What dropping keys costs each layer by itself: weights for the budgets of `CompressKV(layers=...)`.

    error[l] = |o - o'| / |o|, o[b q m] what the attention block writes at the rows of a reply with every key, o' with
    the kept ones and the same input (Frobenius norm), a mean over prompts' batches; divided by its sum over layers.
    The model writes `max_new_tokens` greedily, with every key. selector: such as a CompressKV with equal layers.
    Raises UsageError for a selector that keeps all, fewer than 1 token, or where no layer dropped a key.
    Source: CompressKV, 2508.02401 (offline eviction error by layer). Differs: relative to the layer's own output, since
    their norms grow with depth; the bias of the output projection is left out. Cannot show: errors that layers add up.
    """
    if selector.is_noop or max_new_tokens < 1:
        raise UsageError(f"share={selector.share}, max_new_tokens={max_new_tokens}: drop some keys, write some tokens.")
    network: Any = unwrap(model)
    layout = HeadLayout.of(network)
    found = []
    bar = tqdm(list(prompts.batches(batch_size)), desc="layer errors", disable=not progress, delay=2, leave=False)
    for batch in bar:
        read = _Errors(layout=layout, edits=Edits((selector,)), bound=BatchSpans(batch))
        with tapping(network, read):
            inputs = batch.tensors(device=next(network.parameters()).device)
            network.generate(
                **inputs, max_new_tokens=max_new_tokens + 1, min_new_tokens=max_new_tokens + 1, do_sample=False
            )
        # a layer that dropped nothing lost nothing
        sums = [read.sums.get(layer, (0.0, 1.0)) for layer in range(layout.layers)]
        found.append([(lost / whole) ** 0.5 for lost, whole in sums])
    mean = torch.tensor(found, dtype=torch.float64).mean(0)
    if not float(mean.sum()):
        raise UsageError("no layer dropped a key: give longer prompts, or a smaller share.")
    return tuple((mean / mean.sum()).tolist())


@dataclass(eq=False, kw_only=True)
class _Errors(Steering):
    """A selector that is asked and not obeyed: what it would have changed is measured."""

    sums: dict[int, tuple[float, float]] = field(default_factory=dict)
    """by layer, squares of what is lost and of all"""

    def edit(self, site: Site) -> Call:
        call = super().edit(site)
        if call is not site.call:
            weights = output_weights(site.module, call.sizes[1])
            written = [torch.einsum("bhqd,hdm->bqm", _z(x), weights.float()) for x in (site.call, call)]
            lost, whole = self.sums.get(site.layer, (0.0, 0.0))
            lost += float((written[0] - written[1]).square().sum())
            self.sums[site.layer] = lost, whole + float(written[0].square().sum())
        return site.call


def _z(call: Call) -> Float[Tensor, "b h q d"]:
    out: Any = select(call, ()).engine(call, (), out=True).out
    return out.float()
