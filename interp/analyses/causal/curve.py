"""Causal curves: what a model does as more and more heads are taken out, by any ranking and by chance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.causal.ablation_test import bootstrap, paired, randoms
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind, ablate
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.layers import check_eval
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

Measure = Callable[[nn.Module], Tensor]
"""what the model does as it stands, [p] numbers, one for each prompt of the measure"""


@dataclass(frozen=True)
class Point:
    """One head set taken out, and what every measure said."""

    ranking: str
    """"as loaded", a ranking, "random" or "random by layer" """
    size: int
    heads: HeadSet
    values: dict[str, tuple[float, ...]] = field(repr=False)
    """by measure, one number for each of its prompts"""


@dataclass(frozen=True)
class Curve:
    """All points of one model and one ablation."""

    points: tuple[Point, ...]
    kind: str
    seed: int = 0

    @property
    def rankings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.ranking for point in self.points))

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(self.points[0].values)

    def sizes(self, ranking: str) -> tuple[int, ...]:
        return tuple(dict.fromkeys(point.size for point in self.points if point.ranking == ranking))

    def at(self, ranking: str, size: int, measure: str) -> tuple[float, float, float]:
        """Mean of a measure and its 95% interval, over prompts, and over draws too where there are several."""
        rows = self._rows(ranking, size, measure)
        means = [sum(row) / len(row) for row in rows]
        return sum(means) / len(means), *bootstrap(rows, seed=self.seed)

    def gain(self, ranking: str, size: int, measure: str, over: str = "random") -> tuple[float, float, float]:
        """A measure less the same under another ranking of that size, prompt by prompt, and its 95% interval.

        Values of several draws are averaged first; prompts are resampled. Cannot show: what other draws would give.
        """
        base = 0 if over == "as loaded" else size
        return paired(self._rows(ranking, size, measure), self._rows(over, base, measure), seed=self.seed)

    def _rows(self, ranking: str, size: int, measure: str) -> list[tuple[float, ...]]:
        if measure not in self.measures:
            raise UsageError(f"measure {measure!r} is none: it has {', '.join(self.measures)}.")
        rows = [p.values[measure] for p in self.points if p.ranking == ranking and p.size == size]
        if not rows:
            raise UsageError(f"no point of {ranking!r} with {size} heads: it has {self.sizes(ranking)}.")
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """A row for each ranking, size and measure: a table for pandas."""
        found = []
        for ranking in self.rankings:
            for size in self.sizes(ranking):
                for measure in self.measures:
                    mean, low, high = self.at(ranking, size, measure)
                    found.append(
                        {"ranking": ranking, "heads": size, "measure": measure, "mean": mean, "low": low, "high": high}
                    )
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: heads as names."""
        points = [
            {"ranking": p.ranking, "size": p.size, "heads": [str(h) for h in p.heads], "values": p.values}
            for p in self.points
        ]
        return {"kind": self.kind, "seed": self.seed, "points": points, "rows": self.rows()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Curve":
        """The inverse of to_dict."""
        points = tuple(
            Point(
                point["ranking"],
                point["size"],
                HeadSet.parse(point["heads"]) if point["heads"] else HeadSet(()),
                {name: tuple(values) for name, values in point["values"].items()},
            )
            for point in content["points"]
        )
        return cls(points, content["kind"], content["seed"])

    def __str__(self) -> str:
        return "\n".join(
            f"{row['ranking']:18s} {row['heads']:4d} heads  {row['measure']:16s} {row['mean']:8.3f}  "
            f"[{row['low']:.3f}, {row['high']:.3f}]"
            for row in self.rows()
        )


def causal_curve(
    model: nn.Module,
    rankings: Mapping[str, HeadScores | Sequence[Head]],
    measures: Mapping[str, Measure],
    *,
    sizes: Sequence[int] = (1, 3, 5, 10),
    kind: AblationKind = "zero",
    reference: Prompts | None = None,
    draws: int = 3,
    until: float | None = None,
    seed: int = 0,
    folder: Any = None,
    about: Any = None,
    progress: bool = False,
) -> Curve:
    """Every measure with the first `size` heads of each ranking taken out, for all sizes, beside random heads.

    rankings: by name, a score table (its highest) or heads in order. measures: by name, a function of the model that
    gives one number for each of its own prompts (those of analyses.refusals, losses.token_losses ...); it runs in the
    model as it stands, with the heads out. `draws` random sets of each size, drawn freely and matched by layer to the
    first ranking that is as long, none of whose heads of that size they have; they may have those of others.
    until: a ranking ends at the size at which the first measure has come down to this share of its value as loaded.
    folder: finished points are kept, under `about`: what the measures depend on (their prompts, say).
    Raises UsageError for sizes that leave too few heads for a random set, or a measure that gives no finite numbers.
    Source: the curves of Wu et al. 2404.15574 and of Zhou et al. (ICLR 2025), with random sets matched by layer added.
    Cannot show: that the heads do the task; other heads may take over or be thrown off.
    """
    layout = HeadLayout.of(model)
    every = layout.layers * layout.heads
    ordered = {name: _order(found, every) for name, found in rankings.items()}
    check_eval(model)
    for name, order in ordered.items():
        layout.check(HeadSet(tuple(order)))
        if name in ("as loaded", "random", "random by layer") or len(set(order)) < len(order):
            raise UsageError(f"ranking {name!r} has the name of a control, or a head twice: mend it.")
    if folder is not None and about is None:
        raise UsageError("points in a folder need about=: what the measures depend on, such as their prompts.")
    if not ordered or not measures or draws < 1:
        raise UsageError(
            f"{len(ordered)} rankings, {len(measures)} measures, draws={draws}: give at least one of each."
        )
    wrong = [size for size in sizes if not 0 < size <= every // 2]
    if wrong or not sizes:
        raise UsageError(f"sizes {wrong or '()'} of {every} heads: give numbers from 1 to half of them.")
    short = {name: len(order) for name, order in ordered.items() if len(order) < max(sizes)}
    if short and min(short.values()) < min(sizes):
        raise UsageError(f"ranking {min(short, key=short.__getitem__)!r} has too few heads for sizes {tuple(sizes)}.")
    source = Provenance.of(model)
    what = [source.config_hash, source.weights_hash, source.dtype, source.versions, kind, list(measures), about]
    taken = None if reference is None else [reference.fingerprint(), seed]
    parts = Parts.of(folder, "curve", [*what, taken])

    def point(ranking: str, heads: HeadSet, size: int) -> Point:
        def work() -> dict[str, Tensor]:
            with ablate(model, heads, kind, reference=reference, seed=seed):
                return {str(i): _numbers(name, measure(model)) for i, (name, measure) in enumerate(measures.items())}

        made = parts.get(str(heads), work)
        values = {name: tuple(made[str(i)].tolist()) for i, name in enumerate(measures)}
        return Point(ranking, size, heads, values)

    plan = _plan(ordered, sorted(set(sizes)), layout, draws, seed)
    base = point("as loaded", HeadSet(()), 0)
    points, ended = [base], set()
    main = next(iter(measures))
    floor = -torch.inf if until is None else until * _mean(base, main)
    for ranking, size, heads in _bar(plan, progress):
        if ranking in ended:
            continue
        points.append(point(ranking, heads, size))
        if ranking in ordered and _mean(points[-1], main) <= floor:
            ended.add(ranking)
    return Curve(tuple(points), kind, seed)


def _order(found: HeadScores | Sequence[Head], every: int) -> list[Head]:
    return found.top(every) if isinstance(found, HeadScores) else list(found)


def _plan(
    ordered: Mapping[str, list[Head]], sizes: list[int], layout: HeadLayout, draws: int, seed: int
) -> list[tuple[str, int, HeadSet]]:
    """(ranking, size, heads): rankings first, then random sets."""
    plan = [
        (name, size, HeadSet(tuple(order[:size])))
        for name, order in ordered.items()
        for size in sizes
        if size <= len(order)
    ]
    for size in sizes:
        first = next((order for order in ordered.values() if len(order) >= size), None)
        if first is not None:
            plan += [(name, size, heads) for name, heads in randoms(HeadSet(tuple(first[:size])), layout, draws, seed)]
    return plan


def _numbers(name: str, values: Any) -> Tensor:
    found = torch.as_tensor(values, dtype=torch.float32)
    if found.ndim != 1 or not len(found) or not bool(found.isfinite().all()):
        raise UsageError(
            f"measure {name!r} gave {tuple(found.shape)} numbers, or NaN: give one finite number a prompt."
        )
    return found


def _mean(point: Point, measure: str) -> float:
    return sum(point.values[measure]) / len(point.values[measure])


def _bar(plan: list[Any], progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(plan, desc="causal curve", unit="head set", disable=not progress, delay=2, leave=False)
