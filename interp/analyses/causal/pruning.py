"""Pruning curves: how a loss grows with the share of heads taken out, least important first, beside random orders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.causal.ablation_test import REPLY, Judge, ask, bootstrap, paired
from interp.analyses.identify.gradient_importance import gradient_importance
from interp.analyses.measures.losses import Loss, token_losses
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError, UsageError
from interp.hooks.edit.ablation import AblationKind, ablate
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True, eq=False)
class PruningCurve:
    """Values of every prompt at every share of heads taken out, by scores and by random orders."""

    name: str
    """of the scores"""
    fractions: tuple[float, ...]
    pruned: tuple[HeadSet, ...]
    """the heads out at each fraction, by the scores"""
    values: Float[Tensor, "f p"]
    random: Float[Tensor, "r f p"]
    unit: str
    kind: str
    """the ablation"""
    recompute: bool = False
    keep_per_layer: int = 0
    seed: int = 0

    def point(self, number: int, random: bool = False) -> tuple[float, float, float]:
        """Mean at one fraction and its 95% interval, over prompts, and over draws and prompts for random orders."""
        rows: Any = (self.random[:, number] if random else self.values[number, None]).tolist()
        return float(torch.tensor(rows, dtype=torch.float64).mean()), *bootstrap(rows, seed=self.seed)

    def apart(self, number: int) -> tuple[float, float, float]:
        """Random orders less the scores' at one fraction, each prompt with itself, and its 95% interval over prompts.

        Above 0 in a loss, and below 0 in accuracy, the scores know what can go. Cannot show: other draws of heads.
        """
        return paired(self.random[:, number].tolist(), [self.values[number].tolist()], seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: heads as names, values [f p] and [r f p] as lists."""
        rows = [
            {
                "fraction": fraction,
                "heads": [str(head) for head in self.pruned[i]],
                "scores": self.point(i),
                "random": self.point(i, random=True),
                "apart": self.apart(i),
            }
            for i, fraction in enumerate(self.fractions)
        ]
        named = {key: getattr(self, key) for key in ("name", "unit", "kind", "recompute", "keep_per_layer", "seed")}
        return {**named, "points": rows, "values": self.values.tolist(), "random": self.random.tolist()}

    def __str__(self) -> str:
        lines = [f"{'out':>5s} {'heads':>6s}  {self.name:24s}  random ({self.unit})"]
        for i, fraction in enumerate(self.fractions):
            told = ["{:.3f} [{:.3f}, {:.3f}]".format(*self.point(i, random)) for random in (False, True)]
            lines.append(f"{fraction:5.0%} {len(self.pruned[i]):6d}  {told[0]:24s}  {told[1]}")
        return "\n".join(lines)


def pruning_curve(
    model: nn.Module,
    prompts: Prompts,
    scores: HeadScores | None = None,
    *,
    fractions: Sequence[float] = SHARES,
    recompute: bool = False,
    keep_per_layer: int = 0,
    kind: AblationKind = "zero",
    reference: Prompts | None = None,
    loss: Loss | None = None,
    judge: Judge | None = None,
    max_new_tokens: int = REPLY,
    draws: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> PruningCurve:
    """Loss against the share of heads ablated, in the order of `scores` from the lowest up, and in `draws` random ones.

    value[f p] = loss of prompt p with the round(fraction f x heads) first of an order out; a larger set holds the
    smaller ones. Heads of equal score come in a random order. loss: mean next-token cross-entropy, or loss(logits,
    batch) -> [b]; with judge: its verdict on the greedy reply instead, so that the mean is accuracy.
    scores: any table; None takes `importance` on these prompts, which flatters it: give scores of other prompts.
    recompute: the importance of the heads that are left is measured anew at each fraction, under those that are out.
    keep_per_layer: heads that every layer keeps, in random orders too. kind, reference: see `ablate`.
    Raises UsageError for fractions that do not rise in [0, 1] or leave a layer too few, ScoreError for another layout.
    Source: Michel et al. 1905.10650, section 4.2; recompute as bertology does. Differs: the random orders.
    Cannot show: what pruning saves, since ablated heads are still computed; nor what fine-tuning would win back.
    """
    layout = HeadLayout.of(model)
    counts = _counts(fractions, layout, keep_per_layer)
    if draws < 1:
        raise UsageError(f"draws={draws}: a control needs at least one draw of random heads.")
    if scores is not None and (scores.layers, scores.n_heads) != (layout.layers, layout.heads):
        raise ScoreError(
            f"scores '{scores.name}' have {scores.layers}x{scores.n_heads} heads, the model "
            f"{layout.layers}x{layout.heads}: give scores of this model."
        )
    known: dict[HeadSet, Tensor] = {}
    bar = tqdm(total=len(counts) * (1 + draws), desc="pruning", disable=not progress, delay=2, leave=False)

    def value(heads: HeadSet) -> Tensor:
        if heads not in known and judge is not None:
            replies = ask(model, prompts, heads, kind, max_new_tokens, batch_size, reference)
            verdicts = [judge(reply.text, prompt) for reply, prompt in zip(replies, prompts, strict=True)]
            known[heads] = torch.tensor(verdicts).float()
        elif heads not in known:
            with ablate(model, heads, kind, reference=reference, seed=seed):
                known[heads] = token_losses(model, prompts, batch_size, loss=loss)
        bar.update()
        return known[heads]

    def measured(out: HeadSet) -> HeadScores:
        with ablate(model, out, kind, reference=reference, seed=seed):
            return gradient_importance(model, prompts, loss=loss, batch_size=batch_size, seed=seed)

    scores = measured(HeadSet(())) if scores is None else scores
    order, pruned = _order(scores, seed), [HeadSet(())]
    for count in counts:
        if recompute and len(pruned[-1]):
            # what is out stays out, whatever its slope would be now
            rest = [head for head in _order(measured(pruned[-1]), seed) if head not in pruned[-1]]
            order = [*pruned[-1], *rest]
        pruned.append(_first(order, count, layout, keep_per_layer))
    by_chance = []
    for draw in range(draws):
        shuffled = _shuffled(layout, seed + draw)
        by_chance.append([_first(shuffled, count, layout, keep_per_layer) for count in counts])
    curve = PruningCurve(
        name=scores.name,
        fractions=tuple(fractions),
        pruned=tuple(pruned[1:]),
        values=torch.stack([value(heads) for heads in pruned[1:]]),
        random=torch.stack([torch.stack([value(heads) for heads in row]) for row in by_chance]),
        unit="accuracy" if judge is not None else "nats per token" if loss is None else "loss",
        kind=kind,
        recompute=recompute,
        keep_per_layer=keep_per_layer,
        seed=seed,
    )
    bar.close()
    return curve


def _counts(fractions: Sequence[float], layout: HeadLayout, keep: int) -> list[int]:
    """Heads out at each fraction."""
    shares = list(fractions)
    if not shares or shares != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise UsageError(f"fractions={tuple(fractions)}: give shares of heads from 0 to 1 that rise.")
    if not 0 <= keep <= layout.heads:
        raise UsageError(f"keep_per_layer={keep}: a layer has {layout.heads} heads, so give 0 to {layout.heads}.")
    counts = [round(fraction * layout.size) for fraction in fractions]
    most = layout.size - keep * layout.layers
    if counts[-1] > most:
        raise UsageError(
            f"{counts[-1]} of {layout.size} heads out leaves fewer than {keep} in a layer: take fractions up to "
            f"{most / layout.size:.2f}, or keep fewer."
        )
    return counts


def _shuffled(layout: HeadLayout, seed: int) -> list[Head]:
    heads = list(layout.all())
    return [heads[i] for i in torch.randperm(len(heads), generator=torch.Generator().manual_seed(seed)).tolist()]


def _order(scores: HeadScores, seed: int) -> list[Head]:
    """Every head, the lowest scored first."""
    if scores.values.isnan().any():
        raise UsageError(f"scores '{scores.name}' have heads without a score: give one to each before heads are taken.")
    # where many scores are 0, heads in their own order would take out the first layers
    return sorted(_shuffled(scores.layout, seed), key=lambda head: float(scores.values[head]))


def _first(order: list[Head], count: int, layout: HeadLayout, keep: int) -> HeadSet:
    """The first heads of an order, past those of layers that would be left with fewer than they keep."""
    left, taken = [layout.heads] * layout.layers, []
    for head in order:
        if len(taken) < count and left[head.layer] > keep:
            left[head.layer] -= 1
            taken.append(head)
    return HeadSet(tuple(taken))
