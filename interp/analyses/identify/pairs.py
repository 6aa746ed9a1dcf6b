"""What patching, attribution and vocabulary views share: pairs of prompts, the metric on their logits, a bridge over
the model, and what heads write at the last position."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.analyses.forced import Options
from interp.analyses.scores import HeadScores
from interp.hooks.bridge import bridge
from interp.hooks.capture import check_context
from interp.hooks.heads import HeadLayout
from interp.hooks.modules import check_eval, plain
from interp.hooks.prompts import Prompts
from interp.hooks.provenance import Provenance
from interp.kernels.errors import ModelError, PromptError, UsageError

Metric = Callable[[Tensor, Prompts], Tensor]
"""logits [b v] at the last position and the clean prompts of these rows to one number each, [b]"""
UNITS = {True: "share of the difference", False: "metric"}
"""of a score, by normalize"""
Direction = Literal["denoise", "noise"]


def logit_difference(logits: Float[Tensor, "b v"], prompts: Prompts) -> Float[Tensor, "b"]:
    """The logit of the right answer less that of the wrong one, each the first token of the first one in the meta."""
    ids = answer_tokens(prompts).to(logits.device)
    right, wrong = logits.gather(1, ids).unbind(1)
    return right - wrong


def answer_tokens(prompts: Prompts) -> Int[Tensor, "b 2"]:
    """First token of the first of meta["right"] and of meta["wrong"]. PromptError without, or where they are one."""
    options = Options.of(prompts)
    rows = [(ids[0][0], ids[count][0]) for ids, count in zip(options.ids, options.right, strict=True)]
    for number, (right, wrong) in enumerate(rows):
        if right == wrong:
            raise PromptError(
                f"the right and the wrong answer of prompt {number} both begin with token {right}: give answers that "
                "differ in their first token, or a metric of your own."
            )
    return torch.tensor(rows)


def measured(metric: Metric, logits: Float[Tensor, "b q v"], prompts: Prompts) -> Float[Tensor, "b"]:
    """The metric at the last position, checked."""
    values: Any = metric(logits[:, -1].float(), prompts)
    if not isinstance(values, Tensor) or values.shape != (len(prompts),):
        given = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UsageError(f"the metric gave {given} for {len(prompts)} prompts: return a tensor of one number for each.")
    if not values.isfinite().all():
        raise UsageError(f"the metric gave {values.tolist()}: return finite numbers only.")
    return values.float()


def check_pairs(model: nn.Module, clean: Prompts, corrupt: Prompts, direction: str) -> None:
    """Raise UsageError for another direction, PromptError where the prompts are no pairs of equal length."""
    if direction not in get_args(Direction):
        raise UsageError(f"direction={direction!r}: take 'denoise' (clean into corrupt) or 'noise' (the reverse).")
    if len(clean) != len(corrupt):
        raise PromptError(f"{len(clean)} clean and {len(corrupt)} corrupt prompts: give one of each for a pair.")
    for number, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        if len(one) != len(other):
            raise PromptError(
                f"pair {number} has {len(one)} tokens clean and {len(other)} corrupt: patching goes position by "
                "position, so give prompts of equal length."
            )
    check_context(model, clean)


def by_length(*sides: Prompts, batch_size: int) -> Iterator[tuple[list[int], tuple[Prompts, ...]]]:
    """Batches of prompts of one length, so none is padded: their numbers, and the batch of each side."""
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: a batch holds at least one prompt.")
    lengths = sides[0].lengths
    for _, members in groupby(sorted(range(len(lengths)), key=lengths.__getitem__), key=lengths.__getitem__):
        same = list(members)
        for start in range(0, len(same), batch_size):
            index = same[start : start + batch_size]
            yield index, tuple(replace(side, items=tuple(side[i] for i in index)) for side in sides)


@contextlib.contextmanager
def bridged(model: nn.Module) -> Iterator[Any]:
    """A TransformerLens bridge whose logits are those of the last position: the model where it is one, else a new one.

    A new one is closed again. Raises ModelError where none can be made, or in training mode.
    """
    check_eval(model)
    with contextlib.ExitStack() as stack:
        tl: Any = model if plain(model) is not model else stack.enter_context(bridge(model))
        # the rest of the logits would take most of the memory
        stack.enter_context(tl.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: x[:, -1:])]))
        yield tl


def ids(prompts: Prompts, model: nn.Module) -> Int[Tensor, "b q"]:
    """Token ids of prompts of one length, where the model is."""
    return prompts.tensors(next(model.parameters()).device)["input_ids"]


@dataclass(frozen=True, eq=False)
class Written:
    """What heads write at the last position of one run, and the way from there to the logits; float32."""

    tl: Any
    cache: Any
    """TransformerLens' ActivationCache of the last position"""
    heads: Float[Tensor, "l h b m"]
    """what each head adds to the residual: z W_O, through a norm after attention with its scale in this run"""
    logits: Float[Tensor, "b v"]

    @classmethod
    def of(cls, tl: Any, prompts: Prompts, layout: HeadLayout) -> "Written":
        """Run prompts of one length. Raises ModelError where heads do not add up to what their attention writes."""
        from transformer_lens import ActivationCache

        sites = ("attn.hook_z", "hook_resid_pre", "hook_mlp_out", "hook_resid_post", "ln1_post.hook_scale")
        names = [f"blocks.{layer}.{site}" for layer in range(layout.layers) for site in sites] + ["ln_final.hook_scale"]
        names = [name for name in names if name in tl.hook_dict]
        logits, kept = tl.run_with_cache(ids(prompts, tl), names_filter=names, pos_slice=slice(-1, None))
        cache = ActivationCache({name: value.float() for name, value in kept.items()}, tl)
        stack: Any = cache.stack_head_results()
        heads = stack.squeeze(2).unflatten(0, (layout.layers, layout.heads))
        run = cls(tl, cache, heads, logits[:, -1].float())
        for layer in range(layout.layers):
            heads[layer] = run.added(layer, heads[layer])
            run._check_sum(layer, torch.finfo(logits.dtype).eps)
        return run

    def row(self, number: int) -> "Written":
        """The run of one of its prompts."""
        from transformer_lens import ActivationCache

        one = slice(number, number + 1)
        cache = ActivationCache({name: value[one] for name, value in self.cache.items()}, self.tl)
        return Written(self.tl, cache, self.heads[:, :, one], self.logits[one])

    def added(self, layer: int, wrote: Float[Tensor, "x b m"]) -> Float[Tensor, "x b m"]:
        """What becomes of x W_O in the residual: Gemma 2 and 3 and OLMo 2 have a norm after attention."""
        post = getattr(self.tl.blocks[layer], "ln1_post", None)
        if post is None:
            return wrote
        return wrote * (gain(post) / self.cache[f"blocks.{layer}.ln1_post.hook_scale"].squeeze(1))

    def read(self, added: Float[Tensor, "x b m"]) -> Float[Tensor, "x b m"]:
        """What becomes of a part of the residual before the unembedding: over the final norm's scale, times gamma.

        LayerNorm centres it, RMSNorm does not. Its bias belongs to no part.
        """
        return self.cache.apply_ln_to_stack(added[:, :, None]).squeeze(2) * gain(self.tl.ln_final)

    def check_readout(self, tokens: Int[Tensor, "b n"]) -> None:
        """Raise ModelError unless the last residual, read, gives the logits of these tokens."""
        tl = self.tl
        last = self.cache[f"blocks.{len(self.heads) - 1}.hook_resid_post"].squeeze(1)
        normed, bias = self.read(last[None])[0], getattr(tl.ln_final, "bias", None)
        normed = normed if bias is None else normed + bias.float()
        made = torch.einsum("mbn,bm->bn", tl.W_U[:, tokens].float(), normed) + tl.b_U[tokens].float()
        made = tl.adapter.apply_output_logits_transform(made)
        eps = torch.finfo(tl.W_U.dtype).eps
        if (made - self.logits.gather(1, tokens)).abs().max() > max(1e-3, 4 * eps) * self.logits.abs().max():
            raise ModelError(
                "the final norm and the unembedding do not give the logits of this model: it does more to them than "
                "interp knows, so use activation_patching."
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
        # in 16 bits the difference of two residuals keeps their rounding
        if missed.norm() > max(1e-3, 4 * eps) * wrote.norm() + 4 * eps * after.norm():
            raise ModelError(
                f"the heads of layer {layer} do not add up to what its attention writes: this model changes their sum "
                "in a way that interp does not know, so use activation_patching."
            )


def gain(norm: Any) -> Float[Tensor, "m"] | float:
    """What a norm multiplies by, entry by entry, once it has divided by its scale."""
    weight = getattr(norm, "weight", None)
    return 1.0 if weight is None else weight.float() + bool(norm.uses_weight_offset)


def scored(
    toward: Float[Tensor, "b l h"],
    base: Float[Tensor, "b"],
    source: Float[Tensor, "b"],
    direction: str,
    normalize: bool,
) -> Float[Tensor, "b l h"]:
    """From what a patch from the source run adds to the metric of the base run: positive speaks for the clean answer.

    normalize: over the metric's difference between the runs, NaN where there is none.
    """
    if not normalize:
        return toward if direction == "denoise" else -toward
    return toward / torch.where(torch.isclose(base, source), torch.nan, source - base)[:, None, None]


def table(
    name: str, model: nn.Module, prompts: Prompts, values: Float[Tensor, "b l h"], unit: str, seed: int, **settings: Any
) -> HeadScores:
    """HeadScores of these prompts; a metric is written down by its name."""
    if "metric" in settings:
        settings["metric"] = getattr(settings["metric"], "__name__", type(settings["metric"]).__name__)
    return HeadScores(
        name=name,
        per_prompt=values,
        unit=unit,
        kv_heads=HeadLayout.of(model).kv_heads,
        settings=settings,
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", "")) for prompt in prompts),
    )
