"""Direct logit attribution: what each head adds to the answer by the weights alone."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.identify.pairs import answer_tokens, bridged, by_length, ids, table
from interp.analyses.scores import HeadScores
from interp.hooks.capture import check_context
from interp.hooks.heads import HeadLayout
from interp.hooks.prompts import Prompts
from interp.kernels.errors import ModelError, UsageError


def logit_attribution(
    model: nn.Module,
    prompts: Prompts,
    answers: Sequence[tuple[int, int]] | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Direct logit attribution: what each head writes toward the right answer and away from the wrong one.

    score[b l h] = (z[b h d] W_O[h d m]) / s[b] . (gamma[m] (W_U[m right] - W_U[m wrong])) at the last position, s the
    scale of the final norm in this run; LayerNorm centres what the head wrote, RMSNorm does not. Heads, MLPs and
    embeddings, with the biases that belong to no head (of W_O, the final norm, the unembedding), sum to the difference
    of the two logits; before the soft-cap or scale that a model puts on its logits. A norm after attention (Gemma 2 and
    3, OLMo 2) is applied to each head with its scale in this run.
    answers: token ids (right, wrong) for each prompt; None takes the first tokens of meta["right"] and meta["wrong"].
    Compare two circuits by `a.compare(b, k)`.
    Raises PromptError (no answers), UsageError (ids that the model does not have), ModelError (no bridge, training, or
    heads that do not add up to what attention writes, or a residual that does not give the logits).
    Source: nostalgebraist 2020, Wang et al. 2211.00593; TransformerLens' stack_head_results and apply_ln_to_stack.
    Differs: weights need not be folded, since gamma is multiplied in.
    Cannot show: what a head does through later layers, nor what they would do without it.
    """
    check_context(model, prompts)
    pairs = answer_tokens(prompts) if answers is None else _given(answers, prompts)
    layout = HeadLayout.of(model)
    found = torch.empty(len(prompts), layout.layers, layout.heads)
    bar = tqdm(total=len(prompts), desc="logit attribution", disable=not progress, delay=2, leave=False)
    with bar, bridged(model) as tl, torch.no_grad():
        low, high, known = int(pairs.min()), int(pairs.max()), tl.W_U.shape[1]
        if low < 0 or high >= known:
            raise UsageError(f"answers hold ids from {low} to {high}: those of this model run from 0 to {known - 1}.")
        for index, (batch,) in by_length(prompts, batch_size=batch_size):
            found[index] = _direct(tl, batch, pairs[index].to(tl.W_U.device), layout).cpu()
            bar.update(len(index))
    return table("logit_attribution", model, prompts, found, "logits", seed)


def _given(answers: Sequence[tuple[int, int]], prompts: Prompts) -> Int[Tensor, "b 2"]:
    rows = torch.as_tensor(answers)
    if rows.shape != (len(prompts), 2) or rows.is_floating_point():
        raise UsageError(
            f"answers have shape {list(rows.shape)}: give token ids (right, wrong) for each of {len(prompts)} prompts."
        )
    return rows.long()


def _direct(tl: Any, prompts: Prompts, answers: Int[Tensor, "b 2"], layout: HeadLayout) -> Float[Tensor, "b l h"]:
    from transformer_lens import ActivationCache

    sites = ("attn.hook_z", "hook_resid_pre", "hook_mlp_out", "hook_resid_post", "ln1_post.hook_scale")
    names = [f"blocks.{layer}.{site}" for layer in range(layout.layers) for site in sites] + ["ln_final.hook_scale"]
    names = [name for name in names if name in tl.hook_dict]
    logits, kept = tl.run_with_cache(ids(prompts, tl), names_filter=names, pos_slice=slice(-1, None))
    cache = ActivationCache({name: value.float() for name, value in kept.items()}, tl)
    stack: Any = cache.stack_head_results()
    heads = stack.unflatten(0, (layout.layers, layout.heads))
    for layer in range(layout.layers):
        heads[layer] = _written(tl.blocks[layer], cache, layer, heads[layer], torch.finfo(logits.dtype).eps)
    directions = tl.W_U[:, answers].float().permute(1, 2, 0)
    last = cache[f"blocks.{layout.layers - 1}.hook_resid_post"]
    *each, whole = cache.apply_ln_to_stack(torch.cat([heads.flatten(0, 1), last[None]])).squeeze(2) * gain(tl.ln_final)
    _check_readout(tl, whole, directions, answers, logits[:, -1].float())
    toward = torch.einsum("cbm,bm->bc", torch.stack(each), directions[:, 0] - directions[:, 1])
    return toward.unflatten(1, (layout.layers, layout.heads))


def _written(
    block: Any, cache: Any, layer: int, heads: Float[Tensor, "h b 1 m"], eps: float
) -> Float[Tensor, "h b 1 m"]:
    """What each head adds to the residual; ModelError where that is not what the layer's attention adds."""
    bias, post = getattr(block.attn, "b_O", None), getattr(block, "ln1_post", None)
    bias = torch.zeros_like(heads[0]) if bias is None else bias.float()
    if post is not None:
        factor = gain(post) / cache[f"blocks.{layer}.ln1_post.hook_scale"]
        heads, bias = heads * factor, bias * factor
    before, mlp, after = (
        cache[f"blocks.{layer}.{site}"] for site in ("hook_resid_pre", "hook_mlp_out", "hook_resid_post")
    )
    written = after - before - mlp
    # in 16 bits the difference of two residuals keeps their rounding
    if (written - heads.sum(0) - bias).norm() > max(1e-3, 4 * eps) * written.norm() + 4 * eps * after.norm():
        raise ModelError(
            f"the heads of layer {layer} do not add up to what its attention writes: this model changes their sum in a "
            "way that logit_attribution does not know, so use activation_patching."
        )
    return heads


def _check_readout(
    tl: Any,
    normed: Float[Tensor, "b m"],
    directions: Float[Tensor, "b 2 m"],
    answers: Int[Tensor, "b 2"],
    logits: Float[Tensor, "b v"],
) -> None:
    bias = getattr(tl.ln_final, "bias", None)
    normed = normed if bias is None else normed + bias.float()
    made = (directions @ normed[:, :, None])[..., 0] + tl.b_U[answers].float()
    made = tl.adapter.apply_output_logits_transform(made)
    eps = torch.finfo(tl.W_U.dtype).eps
    if (made - logits.gather(1, answers)).abs().max() > max(1e-3, 4 * eps) * logits.abs().max():
        raise ModelError(
            "the final norm and the unembedding do not give the logits of this model: it does more to them than "
            "logit_attribution knows, so use activation_patching."
        )


def gain(norm: Any) -> Float[Tensor, "m"] | float:
    """What a norm multiplies by, entry by entry, once it has divided by its scale."""
    weight = getattr(norm, "weight", None)
    return 1.0 if weight is None else weight.float() + bool(norm.uses_weight_offset)
