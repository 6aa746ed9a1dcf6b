"""Pruning curves: a loss against the share of heads that are ablated, least important first, and in random orders."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.causal.ablated_measures import source_of_numbers
from interp.analyses.causal.ablation_test import generate_ablated
from interp.analyses.causal.function_identity import function_identity
from interp.analyses.identify.gradient_importance import gradient_importance
from interp.analyses.measures.losses import Loss, token_losses
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trial import BY_DEPTH, RANDOM, Trial
from interp.analyses.results.trials import Trials
from interp.analyses.tasks.task import Judge
from interp.errors import ScoreError, UsageError
from interp.hooks.edit.ablation import AblationKind, ablate
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
OWN_PROMPTS = "The importance was measured on the same prompts, so the curve of the scores is too good."


def pruning_curve(
    model: nn.Module,
    prompts: Prompts,
    scores: HeadScores | None = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    recompute: bool = False,
    keep_per_layer: int = 0,
    ablation: AblationKind = "zero",
    reference: Prompts | None = None,
    loss: Loss | None = None,
    judge: Judge | None = None,
    max_new_tokens: int = REPLY_TOKENS,
    depth: bool = True,
    n_random_sets: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> Trials:
    """Measure a loss with a growing share of heads ablated, in the order of `scores` from the lowest up.

    `value[f p] = loss of prompt p with the first round(fraction f * heads) heads of an order ablated`. A larger set
    contains the smaller ones. Heads of equal score come in a random order. Random orders of all heads are the control:
    a loss below theirs, or an accuracy above, shows that the scores find heads that can be pruned.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts of the loss.
        scores: Any scores of heads. None takes `gradient_importance` on these prompts, which makes the curve look too
            good; give scores of other prompts.
        fractions: Shares of all heads, rising, from 0 to 1.
        recompute: Measure the importance of the remaining heads again at each fraction, with the others ablated.
        keep_per_layer: Number of heads that every layer keeps, in random orders too.
        ablation: "zero", "mean", "resample", "uniform" or "first", see `ablate`.
        reference: Prompts that the ablations "mean" and "resample" take values from.
        loss: Function `loss(logits, batch) -> [b]`, by default the mean next-token cross-entropy.
        judge: Function of a greedy reply and its prompt that returns whether the reply is right. Where it is given,
            its verdict takes the place of the loss.
        max_new_tokens: Number of new tokens of a reply.
        depth: Add the order of the depth profile, in which every head scores the mean of its layer.
        n_random_sets: Number of random orders; a verdict of `Trials.set_test` needs at least 39.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the random orders, of "resample" and of the confidence intervals.
        folder: Where finished head sets are kept, so that an interrupted curve continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        Trials: The measure "loss" or "accuracy" under the name of the scores, its depth profile and "random"; `size` is
        the share of heads.

    Raises:
        UsageError: If the fractions do not rise from 0 to 1, leave a layer too few heads, or a head has no score.
        ScoreError: If the scores have the shape of another model.

    Examples:
        >>> from interp.analyses.pruning import pruning_curve
        >>> curve = pruning_curve(model, prompts, scores, fractions=(0.0, 0.5), n_random_sets=1)
        >>> curve.conditions, curve.sizes("random")
        (('induction', 'induction by depth', 'random'), (0.0, 0.5))

    Source:
        Michel et al. 1905.10650, section 4.2; `recompute` as in the code of bertology.

    Differs:
        Random orders and the depth profile are added.

    Limits:
        Does not show what pruning saves, since ablated heads are still computed, nor what fine-tuning would recover.
    """
    layout = HeadLayout.of(model)
    counts = _counts(fractions, layout, keep_per_layer)
    if n_random_sets < 1:
        raise UsageError(f"n_random_sets={n_random_sets} leaves no control; give at least 1 random order.")
    if scores is not None and (scores.layers, scores.n_heads) != (layout.layers, layout.heads):
        raise ScoreError(
            f"scores '{scores.name}' have {scores.layers}x{scores.n_heads} heads and the model has "
            f"{layout.layers}x{layout.heads}; give scores of this model."
        )
    source = Provenance.of(model, prompts.tokenizer, seed=seed)
    measured_by = judge or loss
    identity = None if folder is None or measured_by is None else function_identity(measured_by)
    made_with = [ablation, prompts.fingerprint(), identity, judge is not None and max_new_tokens]
    referred = None if reference is None else [reference.fingerprint(), seed]
    parts = Parts.of(folder, "pruning", [*source_of_numbers(source), *made_with, referred])
    known: dict[HeadSet, Tensor] = {}
    total = len(counts) * (1 + depth + n_random_sets)
    bar = tqdm(total=total, desc="pruning", disable=not progress, delay=2, leave=False)

    def measure(heads: HeadSet) -> dict[str, Tensor]:
        if judge is not None:
            replies = generate_ablated(
                model, prompts, heads, ablation, max_new_tokens, batch_size, reference=reference, seed=seed
            )
            right = [bool(judge(reply.text, prompt)) for reply, prompt in zip(replies, prompts, strict=True)]
            return {"values": torch.tensor(right).float()}
        with ablate(model, heads, ablation, reference=reference, seed=seed):
            return {"values": token_losses(model, prompts, batch_size, loss=loss)}

    def value(heads: HeadSet) -> tuple[float, ...]:
        if heads not in known:
            known[heads] = parts.get(str(heads), lambda: measure(heads))["values"]
        bar.update()
        return tuple(known[heads].tolist())

    def importance(ablated: HeadSet) -> HeadScores:
        with ablate(model, ablated, ablation, reference=reference, seed=seed):
            return gradient_importance(model, prompts, loss=loss, batch_size=batch_size, seed=seed)

    notes = (OWN_PROMPTS,) if scores is None or recompute else ()
    scores = importance(HeadSet(())) if scores is None else scores
    order, pruned = order_of(scores, seed), [HeadSet(())]
    for count in counts:
        if recompute and len(pruned[-1]):
            # ablated heads stay ablated, whatever their gradient would be now
            rest = [head for head in order_of(importance(pruned[-1]), seed) if head not in pruned[-1]]
            order = [*pruned[-1], *rest]
        pruned.append(_first(order, count, layout, keep_per_layer))
    planned = [(scores.name, 0, size, heads) for size, heads in zip(fractions, pruned[1:], strict=True)]
    if depth:
        by_depth = order_of(scores.depth_profile(), seed)
        planned += [
            (f"{scores.name} {BY_DEPTH}", 0, size, _first(by_depth, count, layout, keep_per_layer))
            for size, count in zip(fractions, counts, strict=True)
        ]
    for draw, shuffled in enumerate(random_orders(layout, n_random_sets, seed)):
        planned += [
            (RANDOM, draw, size, _first(shuffled, count, layout, keep_per_layer))
            for size, count in zip(fractions, counts, strict=True)
        ]
    name = "accuracy" if judge is not None else "loss"
    trials = tuple(
        Trial(condition, {name: value(heads)}, heads, float(size), draw) for condition, draw, size, heads in planned
    )
    bar.close()
    return Trials(
        name=scores.name,
        trials=trials,
        intervention=ablation,
        title="Pruning curve",
        size_name="share of heads",
        shares=("accuracy",),
        claim="smaller effect",
        units={"loss": "nats per token"} if judge is None and loss is None else {},
        notes=notes,
        seed=seed,
        settings={
            "ablation": ablation, "recompute": recompute, "keep_per_layer": keep_per_layer,
            "n_random_sets": n_random_sets, "prompts": prompts.fingerprint(),
        },
        provenance=source,
    )  # fmt: skip


def _counts(fractions: Sequence[float], layout: HeadLayout, keep: int) -> list[int]:
    """Number of heads that are ablated at each fraction."""
    shares = list(fractions)
    if not shares or shares != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise UsageError(f"fractions={tuple(fractions)} make no curve; give shares of heads from 0 to 1 that rise.")
    if not 0 <= keep <= layout.heads:
        raise UsageError(f"keep_per_layer={keep} for layers of {layout.heads} heads; give 0 to {layout.heads}.")
    counts = [round(fraction * layout.size) for fraction in fractions]
    largest = layout.size - keep * layout.layers
    if counts[-1] > largest:
        raise UsageError(
            f"{counts[-1]} of {layout.size} heads leave fewer than {keep} in a layer; give fractions up to "
            f"{largest / layout.size:.2f}, or keep fewer."
        )
    return counts


def _shuffled(layout: HeadLayout, text: str) -> list[Head]:
    heads, seed = list(layout.all()), int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
    return [heads[i] for i in torch.randperm(len(heads), generator=torch.Generator().manual_seed(seed)).tolist()]


def random_orders(layout: HeadLayout, n: int, seed: int) -> list[list[Head]]:
    """Random orders of all heads, the control of a pruning curve.

    Args:
        layout: The layout of the model.
        n: Number of orders.
        seed: Seed of the orders.
    """
    # other draws than the order of equal scores
    return [_shuffled(layout, f"{seed}|{RANDOM}|{draw}") for draw in range(n)]


def order_of(scores: HeadScores, seed: int) -> list[Head]:
    """Every head, the lowest score first; heads of equal score are in a random order.

    Args:
        scores: A score of every head.
        seed: Seed of the order of equal scores.

    Raises:
        UsageError: If a head has no score.
    """
    if scores.values.isnan().any():
        raise UsageError(f"scores '{scores.name}' have heads without a score; give scores of every head.")
    # where many scores are 0, the order of heads would put the first layers first
    return sorted(_shuffled(scores.layout, f"{seed}|{scores.name}"), key=lambda head: float(scores.values[head]))


def _first(order: list[Head], count: int, layout: HeadLayout, keep: int) -> HeadSet:
    """The first heads of an order, without those of layers that would keep too few."""
    left, chosen = [layout.heads] * layout.layers, []
    for head in order:
        if len(chosen) < count and left[head.layer] > keep:
            left[head.layer] -= 1
            chosen.append(head)
    return HeadSet(tuple(chosen))
