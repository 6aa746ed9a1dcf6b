"""HeadScores: a (layer, head) table with intervals and a birth certificate; what every identification returns."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any, Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from interp.analyses.results import files as storage
from interp.analyses.results import statistics
from interp.analyses.results.codec import result
from interp.analyses.results.result import Result
from interp.errors import HeadError, ScoreError, UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance


@dataclass(frozen=True)
class Comparison:
    """How far two score tables of one shape agree."""

    spearman: float
    """rank correlation over heads; NaN where a table is constant"""
    pearson: float
    overlap: int
    """heads that both have in their top k"""
    expected_overlap: float
    """of two random lists: k^2 / heads"""
    p_overlap: float
    """share of permutations with at least this overlap, (1 + hits) / (1 + n_permutations)"""
    k: int


@result
@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """One number per head and prompt; the score of a head is its mean over the prompts that count for it."""

    name: str
    per_prompt: Float32[Tensor, "n l h"]
    """NaN where a prompt does not count"""
    unit: str = ""
    kv_heads: int | None = None
    """None for as many as query heads"""
    threshold: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    """side results, [n l h ...] each"""
    seed: int = 0
    """of the bootstrap"""
    labels: tuple[str, ...] = ()
    """one per prompt, or none"""

    def __post_init__(self) -> None:
        given = torch.as_tensor(self.per_prompt)
        if given.ndim != 3 or not given.numel():
            raise ScoreError(f"scores '{self.name}' have shape {list(given.shape)}; give [prompts, layers, heads].")
        if given.isinf().any():
            raise ScoreError(
                f"scores '{self.name}' hold an infinite value; give numbers, or NaN where a prompt does not count."
            )
        settings, labels = storage.plain(self.settings, f"settings of '{self.name}'"), tuple(map(str, self.labels))
        if labels and len(labels) != len(given):
            raise ScoreError(
                f"scores '{self.name}' have {len(labels)} labels for {len(given)} prompts; give one each, or none."
            )
        for key, extra in self.extras.items():
            if extra.shape[:3] != given.shape:
                raise ScoreError(
                    f"'{key}' beside scores '{self.name}' has shape {list(extra.shape)}; "
                    f"it must begin with {list(given.shape)}."
                )
        try:
            HeadLayout(given.shape[1], given.shape[2], self.kv_heads or given.shape[2])
        except HeadError as error:
            raise ScoreError(f"scores '{self.name}': {error}") from error
        extras = {key: extra.detach().cpu().contiguous() for key, extra in self.extras.items()}
        for key, value in (
            ("per_prompt", given.detach().to("cpu", torch.float32, copy=True).contiguous()),
            ("kv_heads", self.kv_heads or given.shape[2]),
            ("settings", settings),
            ("extras", extras),
            ("labels", labels),
        ):
            object.__setattr__(self, key, value)

    @property
    def layers(self) -> int:
        return self.per_prompt.shape[1]

    @property
    def n_heads(self) -> int:
        """Heads of one layer."""
        return self.per_prompt.shape[2]

    @property
    def layout(self) -> HeadLayout:
        """Of the table; its head_dim is not known."""
        return HeadLayout(self.layers, self.n_heads, self.kv_heads or self.n_heads)

    @property
    def counted(self) -> int:
        """Prompts that count for at least one head."""
        return int((~self.per_prompt.isnan()).flatten(1).any(1).sum())

    @cached_property
    def values(self) -> Float32[Tensor, "l h"]:
        """Mean over the prompts that count for the head, each weighing the same; NaN where none does."""
        means = statistics.weighted_means(
            torch.ones(1, len(self.per_prompt), dtype=torch.float64), self.per_prompt.flatten(1)
        )
        return means.view(self.layers, self.n_heads).float()

    def by_group(self, kv_heads: int | None = None) -> Float32[Tensor, "l g"]:
        """The best query head of each kv head, whose query heads share a cache; -inf where none has a score."""
        return self.values.nan_to_num(-torch.inf).unflatten(1, (kv_heads or self.layout.kv_heads, -1)).amax(-1)

    @cached_property
    def frequency(self) -> Float32[Tensor, "l h"]:
        """Share of the prompts that count for the head in which its score is above 0."""
        active = torch.where(self.per_prompt.isnan(), torch.nan, (self.per_prompt > 0).float())
        return active.nanmean(0)

    def interval(
        self, level: float = 0.95, n_resamples: int = 1000
    ) -> tuple[Float32[Tensor, "l h"], Float32[Tensor, "l h"]]:
        """Percentile bootstrap over the counted prompts: the lower and upper end of the mean.

        Seeded by `seed`; bit-equal in any process, with any number of threads. NaN for a head with fewer than two
        prompts that count, since one prompt says nothing about prompts.
        Cannot show: error from how the prompts were chosen.
        """
        if not 0 < level < 1 or n_resamples < 1:
            raise UsageError(
                f"level={level}, n_resamples={n_resamples}: give a level between 0 and 1 and at least one resample."
            )
        ends = statistics.column_intervals(self.per_prompt.flatten(1), level, n_resamples, self.seed)
        low, high = ends.view(2, self.layers, self.n_heads)
        return low, high

    @cached_property
    def _interval(self) -> tuple[Tensor, Tensor]:
        return self.interval()

    @property
    def low(self) -> Float32[Tensor, "l h"]:
        """Lower end of the 95% interval."""
        return self._interval[0]

    @property
    def high(self) -> Float32[Tensor, "l h"]:
        """Upper end of the 95% interval."""
        return self._interval[1]

    def top(self, k: int = 10) -> list[Head]:
        """The k highest scored heads, highest first, ties in the order of heads; heads without a score never."""
        if k < 0:
            raise UsageError(f"top {k} heads: give a number of heads, 0 or more.")
        flat = self.values.flatten()
        order = flat.nan_to_num(nan=-math.inf).sort(descending=True, stable=True).indices.tolist()
        return [Head(*divmod(i, self.n_heads)) for i in order[:k] if not flat[i].isnan()]

    def heads(self, *, top: int | None = None, above: float | None = None) -> HeadSet:
        """The `top` highest scored heads, those scored `above` a value, or both; by default above the threshold."""
        if top is None and above is None:
            if self.threshold is None:
                raise UsageError(f"scores '{self.name}' have no threshold; say heads(top=10) or heads(above=0.1).")
            above = self.threshold
        chosen = HeadSet(tuple(self.top(self.layers * self.n_heads if top is None else top)))
        return chosen if above is None else chosen & HeadSet.from_mask(self.values > above)

    select = heads

    def random_like(self, heads: HeadSet | int, seed: int, match: Literal["free", "layer"] = "free") -> HeadSet:
        """As many random heads as `heads` (a set, or how many from the top), none of which is in it."""
        chosen = self.heads(top=heads) if isinstance(heads, int) else heads
        return chosen.random_like(self.layout, seed, match)

    def compare(self, other: "HeadScores", k: int = 10, n_permutations: int = 1000, seed: int = 0) -> Comparison:
        """Correlations over the heads that both score, and the overlap of their top k beside what chance gives.

        p permutes the heads of one table. Cannot show: that the heads do the same, only that both rank them alike.
        """
        from scipy.stats import rankdata

        if self.values.shape != other.values.shape:
            raise ScoreError(
                f"'{self.name}' has {self.layers}x{self.n_heads} heads and '{other.name}' has "
                f"{other.layers}x{other.n_heads}; compare tables of one shape."
            )
        both = ~(self.values.isnan() | other.values.isnan())
        mine, theirs = self.values[both].double(), other.values[both].double()
        if not 1 <= k <= len(mine):
            raise UsageError(f"top {k} of {len(mine)} scored heads: give a k from 1 to {len(mine)}.")
        ranks = [values.sort(descending=True, stable=True).indices[:k].tolist() for values in (mine, theirs)]
        overlap = len(set(ranks[0]) & set(ranks[1]))
        return Comparison(
            spearman=statistics.correlation(*(torch.from_numpy(rankdata(values)) for values in (mine, theirs))),
            pearson=statistics.correlation(mine, theirs),
            overlap=overlap,
            expected_overlap=k * k / len(mine),
            p_overlap=statistics.overlap_p_value(len(mine), k, overlap, n_permutations, seed),
            k=k,
        )

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row per head: layer, head, name, value, low, high, frequency."""
        import pandas as pd

        heads = list(self)
        columns = {"value": self.values, "low": self.low, "high": self.high, "frequency": self.frequency}
        return pd.DataFrame(
            {
                "layer": [head.layer for head in heads],
                "head": [head.head for head in heads],
                "name": [str(head) for head in heads],
                **{name: table.flatten().numpy() for name, table in columns.items()},
            }
        )

    @classmethod
    def concat(cls, parts: Sequence["HeadScores"]) -> "HeadScores":
        """The prompts of all parts in one table; name, settings and model must be the same. Raises ScoreError."""
        if not parts:
            raise ScoreError("no scores to join; give at least one table.")
        first = parts[0]
        for part in parts[1:]:
            for key in ("name", "unit", "layers", "n_heads", "kv_heads", "threshold", "settings"):
                if getattr(part, key) != getattr(first, key):
                    raise ScoreError(
                        f"scores differ in {key} ({getattr(first, key)!r} and {getattr(part, key)!r}); "
                        "join only parts of one analysis of one model."
                    )
            if part.extras.keys() != first.extras.keys():
                raise ScoreError(
                    f"scores differ in extras ({sorted(first.extras)} and {sorted(part.extras)}); join equal parts."
                )
            if first.provenance is not None and part.provenance is not None:
                first.provenance.check_model(part.provenance)
        labelled = all(part.labels for part in parts)
        return cls(
            per_prompt=torch.cat([part.per_prompt for part in parts]),
            extras={key: storage.joined([part.extras[key] for part in parts], key) for key in first.extras},
            labels=tuple(label for part in parts for label in part.labels) if labelled else (),
            provenance=next((part.provenance for part in parts if part.provenance is not None), None),
            **{key: getattr(first, key) for key in ("name", "unit", "kv_heads", "threshold", "settings", "seed")},
        )

    def summary(self, top: int = 10) -> str:
        """The highest scored heads with their intervals, one a line, under a line about the table."""
        limit = "" if self.threshold is None else f", {len(self.heads())} heads above {self.threshold:g}"
        lines = [f"{self.name}: {self.unit}, {self.counted} prompts counted{limit}"]
        for head in self.top(top):
            low, high = float(self.low[head]), float(self.high[head])
            interval = "" if math.isnan(low) else f"  [{low:.3f}, {high:.3f}]"
            lines.append(f"  {head!s:8s} {self[head]:.3f}{interval}")
        return "\n".join(lines)

    def __len__(self) -> int:
        return self.layers * self.n_heads

    def __iter__(self) -> Iterator[Head]:
        return iter(self.layout.all())

    def __getitem__(self, head: Any) -> float:
        found = Head.parse(head)
        self.layout.check(found)
        return float(self.values[found.layer, found.head])

    def __repr__(self) -> str:
        best = "".join(f", top {self._told(head)}" for head in self.top(1))
        return f"HeadScores({self.name!r}, {self.layers}x{self.n_heads}, n={self.counted}{best})"

    def _told(self, head: Head) -> str:
        low, high = float(self.low[head]), float(self.high[head])
        interval = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        return f"{head} {self[head]:.2f}{interval}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{head}</td><td>{self[head]:.3f}</td><td>{float(self.low[head]):.3f}</td>"
            f"<td>{float(self.high[head]):.3f}</td><td>{float(self.frequency[head]):.2f}</td></tr>"
            for head in self.top(10)
        )
        unit = f" ({escape(self.unit)})" if self.unit else ""
        return (
            f"<table><caption>{escape(self.name)}{unit}, {self.layers}x{self.n_heads} heads, n={self.counted}</caption>"
            f"<tr><th>head</th><th>value</th><th>low</th><th>high</th><th>frequency</th></tr>{rows}</table>"
        )
