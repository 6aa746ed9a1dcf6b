"""The outputs of heads at the last position, read through a TransformerLens bridge."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.errors import ModelError, UsageError
from interp.hooks.model.finite import check_logits
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import check_eval
from interp.hooks.model.weights import input_device
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.transformerlens.bridge import bridge


def by_length(*sides: Prompts, batch_size: int) -> Iterator[tuple[list[int], tuple[Prompts, ...]]]:
    """Batches of prompts of equal length, so that none is padded.

    Args:
        sides: Prompts of equal number and lengths, such as clean and corrupted prompts.
        batch_size: Number of prompts of a batch.

    Yields:
        The numbers of the prompts, and their batch of each side.

    Raises:
        UsageError: If `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} holds no prompt; give at least 1.")
    lengths = sides[0].lengths
    for _, members in groupby(sorted(range(len(lengths)), key=lengths.__getitem__), key=lengths.__getitem__):
        same = list(members)
        for start in range(0, len(same), batch_size):
            index = same[start : start + batch_size]
            yield index, tuple(replace(side, items=tuple(side[i] for i in index)) for side in sides)


@contextlib.contextmanager
def bridged(model: nn.Module) -> Iterator[Any]:
    """Open a TransformerLens bridge whose logits are those of the last position.

    A model that is a bridge is used itself. Otherwise a new bridge is made, and closed on exit.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.

    Raises:
        ModelError: If no bridge can be made, or the model is in training mode.
    """
    check_eval(model)
    with contextlib.ExitStack() as stack:
        is_bridge = isinstance(getattr(model, "original_model", None), nn.Module)
        tl: Any = model if is_bridge else stack.enter_context(bridge(model))
        # logits of all positions would take most of the memory
        stack.enter_context(tl.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: x[:, -1:])]))
        yield tl


def ids(prompts: Prompts, model: nn.Module) -> Int[Tensor, "b q"]:
    """Token ids of prompts of equal length, on the device of the model."""
    return prompts.tensors(input_device(model))["input_ids"]


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """Outputs of heads at the last position of one run, and the way from there to the logits; float32."""

    tl: Any
    cache: Any
    """TransformerLens' ActivationCache of the last position"""
    heads: Float[Tensor, "l h b m"]
    """contribution of each head to the residual stream: `z W_O`, through a norm after attention with its scale in this
    run"""
    logits: Float[Tensor, "b v"]

    @classmethod
    def of(cls, tl: Any, prompts: Prompts, layout: HeadLayout) -> "HeadOutputs":
        """Run prompts of equal length.

        Args:
            tl: A bridge, see `bridged`.
            prompts: Prompts of equal length.
            layout: Layers and heads of the model.

        Raises:
            ModelError: If the outputs of the heads do not add up to the output of their attention.
        """
        from transformer_lens import ActivationCache

        sites = ("attn.hook_z", "hook_resid_pre", "hook_mlp_out", "hook_resid_post", "ln1_post.hook_scale")
        names = [f"blocks.{layer}.{site}" for layer in range(layout.layers) for site in sites] + ["ln_final.hook_scale"]
        names = [name for name in names if name in tl.hook_dict]
        logits, kept = tl.run_with_cache(ids(prompts, tl), names_filter=names, pos_slice=slice(-1, None))
        check_logits(tl, logits[:, -1], {"input_ids": ids(prompts, tl)})
        cache = ActivationCache({name: value.float() for name, value in kept.items()}, tl)
        stack: Any = cache.stack_head_results()
        heads = stack.squeeze(2).unflatten(0, (layout.layers, layout.heads))
        run = cls(tl, cache, heads, logits[:, -1].float())
        for layer in range(layout.layers):
            heads[layer] = run.added(layer, heads[layer])
            run._check_sum(layer, torch.finfo(logits.dtype).eps)
        return run

    def row(self, number: int) -> "HeadOutputs":
        """The outputs on one of the prompts."""
        from transformer_lens import ActivationCache

        one = slice(number, number + 1)
        cache = ActivationCache({name: value[one] for name, value in self.cache.items()}, self.tl)
        return HeadOutputs(self.tl, cache, self.heads[:, :, one], self.logits[one])

    def added(self, layer: int, wrote: Float[Tensor, "x b m"]) -> Float[Tensor, "x b m"]:
        """The contribution of `x W_O` to the residual stream: Gemma 2 and 3 and OLMo 2 have a norm after attention."""
        post = getattr(self.tl.blocks[layer], "ln1_post", None)
        if post is None:
            return wrote
        return wrote * (gain(post) / self.cache[f"blocks.{layer}.ln1_post.hook_scale"].squeeze(1))

    def read(self, added: Float[Tensor, "x b m"]) -> Float[Tensor, "x b m"]:
        """A part of the residual stream after the final norm: divided by the scale of the norm, times its gain.

        LayerNorm centres the part, RMSNorm does not. The bias of the norm belongs to no part.
        """
        return self.cache.apply_ln_to_stack(added[:, :, None]).squeeze(2) * gain(self.tl.ln_final)

    def check_readout(self, tokens: Int[Tensor, "b n"]) -> None:
        """Check that the last residual, after `read` and the unembedding, gives the logits of these tokens.

        Raises:
            ModelError: If it does not.
        """
        tl = self.tl
        last = self.cache[f"blocks.{len(self.heads) - 1}.hook_resid_post"].squeeze(1)
        normed, bias = self.read(last[None])[0], getattr(tl.ln_final, "bias", None)
        normed = normed if bias is None else normed + bias.float()
        made = torch.einsum("mbn,bm->bn", tl.W_U[:, tokens].float(), normed) + tl.b_U[tokens].float()
        made = tl.adapter.apply_output_logits_transform(made)
        eps = torch.finfo(tl.W_U.dtype).eps
        if (made - self.logits.gather(1, tokens)).abs().max() > max(1e-3, 4 * eps) * self.logits.abs().max():
            raise ModelError(
                "the final norm and the unembedding do not give the logits of this model, which must do something else "
                "to them; use activation_patching."
            )

    def _check_sum(self, layer: int, eps: float) -> None:
        bias = getattr(self.tl.blocks[layer].attn, "b_O", None)
        bias = torch.zeros_like(self.heads[layer, 0]) if bias is None else bias.float().expand_as(self.heads[layer, 0])
        before, mlp, after = (
            self.cache[f"blocks.{layer}.{site}"].squeeze(1)
            for site in ("hook_resid_pre", "hook_mlp_out", "hook_resid_post")
        )
        wrote = after - before - mlp
        missed = wrote - self.heads[layer].sum(0) - self.added(layer, bias[None])[0]
        # in 16 bits the difference of two residuals has the rounding error of both
        if missed.norm() > max(1e-3, 4 * eps) * wrote.norm() + 4 * eps * after.norm():
            raise ModelError(
                f"the outputs of the heads of layer {layer} do not add up to the output of its attention, so the model "
                "must change their sum; use activation_patching."
            )


def gain(norm: Any) -> Float[Tensor, "m"] | float:
    """The factor of each entry in a norm, after the division by its scale."""
    weight = getattr(norm, "weight", None)
    return 1.0 if weight is None else weight.float() + bool(norm.uses_weight_offset)
