"""Sahara: the group of heads whose absence turns a model's representation of a whole set of queries furthest."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.causal.ablation_test import randoms
from interp.analyses.causal.sweep import last_hidden, sweep_sets
from interp.analyses.identify._subspace import angle, angle_interval
from interp.analyses.identify.ships import Ablation
from interp.analyses.results.files import digest
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts


@dataclass(frozen=True)
class Group:
    """A head set and how far its absence turns the queries' subspace."""

    name: str
    """"sahara", "random" or "random by layer" """
    heads: HeadSet
    degrees: float
    one_minus_cos: float
    low: float
    high: float
    """95% interval of degrees over prompts, see `angle_interval`"""


@dataclass(frozen=True)
class Sahara:
    """Greedy groups of growing size, each beside random ones of its size, and the first step's score of every head."""

    scores: HeadScores
    ranking: tuple[Head, ...]
    """in the order in which the heads were added"""
    groups: tuple[Group, ...]

    def heads(self, k: int) -> HeadSet:
        """The first k heads that were added."""
        if not 0 < k <= len(self.ranking):
            raise UsageError(f"{k} heads of a group of {len(self.ranking)}: give a number from 1 to that.")
        return HeadSet(tuple(self.ranking[:k]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: heads as names."""
        rows = [{**vars(group), "heads": [str(head) for head in group.heads]} for group in self.groups]
        return {"ranking": [str(head) for head in self.ranking], "groups": rows}

    def at(self, name: str, size: int) -> tuple[float, float, float]:
        """Mean degrees of the groups of one name and size, the least and the largest of them."""
        found = [group.degrees for group in self.groups if group.name == name and len(group.heads) == size]
        if not found:
            raise UsageError(f"no group {name!r} of {size} heads: take a name and a size of the table.")
        return sum(found) / len(found), min(found), max(found)

    def __str__(self) -> str:
        return "\n".join(
            f"{len(g.heads):2d} {g.name:18s} {g.degrees:8.3f} deg  [{g.low:.3f}, {g.high:.3f}]  1 - cos "
            f"{g.one_minus_cos:.2e}  {g.heads}"
            for g in self.groups
        )


def sahara(
    model: nn.Module,
    prompts: Prompts,
    *,
    size: int = 3,
    ablation: Ablation = "uniform",
    components: int = 1,
    heads: Any = None,
    draws: int = 10,
    batch_size: int = 8,
    rows: int | None = None,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> Sahara:
    """Grow a group of heads, at each step by the head with which the queries' subspace turns furthest.

    M[p m] = what enters the output embeddings at the last token of each prompt; U its first `components` left singular
    vectors, as loaded and with a group out; phi = sum of the principal angles between the two, in degrees, in float64.
    size: heads of the largest group; draws: random groups of each size, drawn freely and matched by layer, in the same
    table. ablation as in `ships`; other arguments as in `sweep`. Cost: size times L H forwards of each prompt, less
    what is shared.
    Raises UsageError for fewer prompts than `components` + 1, since one prompt spans the same line whatever happens.
    Source: Zhou et al. (ICLR 2025), section 4 and algorithm 1. Differs: angles by their sines where they are small
    (the released code takes arccos of a clamped product), 1 - cos beside degrees, random groups.
    Cannot show: which way the representation turned, or that replies change; the angle has no sign.
    """
    layout = HeadLayout.of(model)
    chosen = layout.all() if heads is None else HeadSet.parse(heads, layout)
    layout.check(chosen)
    if len(prompts) <= components or components < 1:
        raise UsageError(
            f"{len(prompts)} prompts and components={components}: a subspace of prompts turns only where prompts "
            "outnumber components, so give at least one more."
        )
    most = min(len(chosen), layout.size // 2)
    if not 0 < size <= most or draws < 1:
        raise UsageError(f"size={size}, draws={draws}: give 1 to {most} heads and at least one random draw.")
    settings: dict[str, Any] = {"batch_size": batch_size, "rows": rows, "folder": folder, "progress": progress}
    hidden = partial(sweep_sets, model, prompts, kind=ablation, metric=last_hidden, **settings)
    base = hidden([HeadSet(())]).values[:, 0].double()
    added: list[Head] = []
    groups: list[Group] = []
    first = torch.full((1, layout.layers, layout.heads), torch.nan)
    for step in range(size):
        left = [head for head in chosen if head not in added]
        found = hidden([HeadSet((*added, head)) for head in left]).values.double()
        turned = torch.tensor([angle(base, found[:, i], components) for i in range(len(left))], dtype=torch.float64)
        if not step:
            for head, degrees in zip(left, turned.tolist(), strict=True):
                first[0, head.layer, head.head] = degrees
        added.append(left[int(turned.argmax())])
        group = HeadSet(tuple(added))
        drawn = [("sahara", group), *randoms(group, layout, draws, seed)]
        after = hidden([heads for _, heads in drawn]).values.double()
        groups += [_group(name, own, base, after[:, i], components, seed) for i, (name, own) in enumerate(drawn)]
    scores = HeadScores(
        name=f"sahara:{ablation}",
        per_prompt=first,
        unit="degrees",
        kv_heads=layout.kv_heads,
        settings={"components": components, "prompts": prompts.fingerprint(), "ranking": list(map(str, added))},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        seed=seed,
        labels=(f"{len(prompts)} prompts together, {digest(prompts.fingerprint())}",),
    )
    return Sahara(scores, tuple(added), tuple(groups))


def _group(name: str, heads: HeadSet, before: Tensor, after: Tensor, components: int, seed: int) -> Group:
    degrees = angle(before, after, components)
    interval = angle_interval(before, after, components, seed)
    return Group(name, heads, degrees, 2 * math.sin(math.radians(degrees) / 2) ** 2, *interval)
