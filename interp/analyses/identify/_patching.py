"""Patching z of each head from one run into another, through TransformerLens."""

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.analyses.identify._prompt_pairs import Metric, measured
from interp.analyses.measures.head_outputs import ids
from interp.hooks.edit.partial_forward import record_hidden_states, resume_from_layer
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts


@torch.no_grad()
def patched(
    metric: Metric,
    frozen: Sequence[str],
    rows: int,
    tl: Any,
    base: Prompts,
    source: Prompts,
    clean: Prompts,
    done: Callable[[], Any],
) -> tuple[Float[Tensor, "b l h"], Float[Tensor, "b"], Float[Tensor, "b"]]:
    """Change of the base run's metric by z of each head from the source run, and the metric of both runs.

    Args:
        metric: Function of the logits at the last position and the clean prompts.
        frozen: Sites that keep their values of the base run; without any, only the patched head is fixed.
        rows: Number of sequences per forward pass, where each sequence is one pair with one head patched.
        tl: A TransformerLens bridge.
        base: Prompts of the run that is patched, all of one length.
        source: Prompts of the run that the outputs come from.
        clean: The clean prompts, which the metric is given.
        done: Called after each layer.
    """
    import pandas as pd
    from transformer_lens import patching

    # TransformerLens' progress bar cannot be turned off
    sweep = _with_globals(patching.generic_activation_patch, tqdm=lambda cells: cells)
    layout, value = HeadLayout.of(tl), partial(measured, metric, prompts=clean)
    layers, b = range(layout.layers), len(base)
    # several heads are patched in one forward pass, each in other rows
    parts = -(-layout.heads // max(1, rows // b))
    each = -(-layout.heads // parts)

    def set_heads(z: Tensor, index: list[int], there: Tensor) -> Tensor:
        for row, head in enumerate(range(index[1], min(index[1] + each, layout.heads))):
            z[row * b : (row + 1) * b, :, head] = there[:, :, head]
        return z

    logits, cache = tl.run_with_cache(ids(source, tl), names_filter=[f"blocks.{layer}.attn.hook_z" for layer in layers])
    at_source = value(logits)
    held = [f"blocks.{layer}.{site}" for layer in layers for site in frozen]
    tokens = ids(base, tl)
    with record_hidden_states(tl) as hidden:
        logits, own = tl.run_with_cache(tokens, names_filter=held)
    at_base, found = value(logits), []
    with tl.hooks(fwd_hooks=[(name, partial(_held, value=own[name])) for name in held]):
        for layer in layers:
            with resume_from_layer(tl, layer, hidden[layer].repeat(each, 1, 1)):
                result = sweep(
                    tl,
                    tokens.repeat(each, 1),
                    cache,
                    lambda logits: torch.cat([value(part) for part in logits.split(b)]),
                    patch_setter=set_heads,
                    activation_name="z",
                    index_df=pd.DataFrame({"layer": layer, "first": range(0, layout.heads, each)}),
                    reduce="none",
                )
            found.append(result.values.view(-1, b)[: layout.heads].T)
            done()
    at_base, patched = at_base.cpu(), torch.stack(found, 1).cpu()
    return patched - at_base[:, None, None], at_base, at_source.cpu()


def _held(now: Tensor, hook: Any, value: Tensor) -> Tensor:
    # a copy, since a patch at the same place writes into it
    """The value of the base run, once for each row."""
    return value.repeat(len(now) // len(value), *[1] * (value.dim() - 1))


def _with_globals(function: Any, **names: Any) -> Any:
    """The function with other values for some of the globals it reads; its module is left alone."""
    made = FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
