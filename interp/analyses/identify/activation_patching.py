"""Patching: what the answer does when a head writes what it wrote in another run."""

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses.identify._prompt_pairs import Direction, Metric, effects, logit_difference, measured
from interp.analyses.measures.head_outputs import ids
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.edit.partial_forward import record_hidden_states, resume_from_layer
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts


def activation_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts,
    metric: Metric = logit_difference,
    *,
    direction: Direction = "denoise",
    normalize: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Total effect of a head: z of one head, at all positions, comes from the other run of the pair.

    direction "denoise" puts z[b q h d] of the clean run into the corrupt one (is the head enough?), "noise" the reverse
    (is it needed?). effect[b l h] = M_patched - M_corrupt (denoise) or M_clean - M_patched (noise), so that either way
    a head that speaks for the clean answer is positive; score = effect / (M_clean - M_corrupt), 1 for a head that
    carries all of the difference. A pair without a difference does not count (NaN). normalize=False: the effect.
    clean, corrupt: pairs of equal token length, as of tasks.ioi. metric: by default the logit difference of the clean
    prompts' meta["right"] and meta["wrong"] (first tokens), else a function of the logits [b v] at the last position
    and the clean prompts [b] that gives [b]. Each layer's forwards begin at it; batch_size: rows of one, pairs of one
    length, each with as many heads as fit.
    Two circuits: `a.compare(b, k)` has the overlap of their top k and the rank correlation.
    Raises PromptError (no pairs, unequal length, no answers), UsageError (metric), ModelError (no bridge, training).
    Source: Meng et al. 2202.05262, Wang et al. 2211.00593; TransformerLens' get_act_patch_attn_head_out_all_pos.
    Differs: per pair, normalised, both directions.
    Cannot show: by which path a head acts, nor heads that others stand in for; ratios of small differences are noisy.
    """
    name, measure = "activation_patching", partial(_patched, metric, (), batch_size)
    return effects(name, model, clean, corrupt, metric, measure, direction, normalize, batch_size, seed, progress)


def path_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts,
    metric: Metric = logit_difference,
    *,
    mlps: Literal["frozen", "live"] = "frozen",
    direction: Direction = "noise",
    normalize: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Direct effect of a head: its z comes from the other run, and z of all other heads stays as it was.

    mlps "frozen" holds the MLPs too, which leaves the path head -> logits alone: with direction "noise" the last
    residual is r_clean + (z_corrupt[h d] - z_clean[h d]) W_O[h d m] at the last position, read by the final norm (its
    scale made anew) and the unembedding; a norm after attention (Gemma 2 and 3, OLMo 2) is made anew as well.
    "live" lets later MLPs answer, as do the authors. Scores, signs, other arguments and errors as activation_patching;
    compare circuits by `a.compare(b, k)`.
    Source: Wang et al. 2211.00593; Merullo et al. 2310.08744. TransformerLens' get_act_patch_direct_path ends at q, k
    and v of later heads, so this is its activation patching with the rest held. Differs: MLPs frozen by default.
    Cannot show: what a head does through later heads; the final norm mixes effects, so they need not add up.
    """
    if mlps not in ("frozen", "live"):
        raise UsageError(f"mlps={mlps!r}: take 'frozen' (the path to the logits alone) or 'live' (later MLPs answer).")
    frozen = ("attn.hook_z",) if mlps == "live" else ("attn.hook_z", "hook_mlp_out")
    name, measure = "path_patching", partial(_patched, metric, frozen, batch_size)
    return effects(
        name, model, clean, corrupt, metric, measure, direction, normalize, batch_size, seed, progress, mlps=mlps
    )


@torch.no_grad()
def _patched(
    metric: Metric,
    frozen: Sequence[str],
    rows: int,
    tl: Any,
    base: Prompts,
    source: Prompts,
    clean: Prompts,
    done: Callable[[], Any],
) -> tuple[Float[Tensor, "b l h"], Float[Tensor, "b"], Float[Tensor, "b"]]:
    """What each head from the source run adds to the metric of the base run, and the metric of both runs.

    frozen: the sites that stay as they were in the base run; without any, nothing but the one head is held.
    """
    import pandas as pd
    from transformer_lens import patching

    # its progress bar cannot be turned off
    sweep = _with_globals(patching.generic_activation_patch, tqdm=lambda cells: cells)
    layout, value = HeadLayout.of(tl), partial(measured, metric, prompts=clean)
    layers, b = range(layout.layers), len(base)
    # heads that are patched in one forward, each in rows of its own
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
    # a copy: a patch at the same place writes into it
    return value.repeat(len(now) // len(value), *[1] * (value.dim() - 1))


def _with_globals(function: Any, **names: Any) -> Any:
    """The function with other values for some of the globals it reads, its module left alone."""
    made = FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
