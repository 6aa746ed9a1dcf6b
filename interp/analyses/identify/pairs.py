"""What patching and attribution share: pairs of prompts, the metric on their logits, and a bridge over the model."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from interp.kernels.errors import PromptError, UsageError

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
