"""HeadScores: one number for each head and prompt, with intervals and provenance; the result of head identification."""

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
from interp.analyses.results.comparison import Comparison
from interp.analyses.results.reply_limit import sentence_of_scores
from interp.analyses.results.result import Result
from interp.errors import HeadError, ScoreError, UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance


@result
@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """One number for each head and prompt; the score of a head is its mean over the prompts that count for it.

    Iterating gives the heads, `scores["L1H2"]` the score of one, and `save` and `load` keep everything bit for bit.

    Raises:
        ScoreError: If the table is not `[n l h]`, holds an infinite value, or a field does not fit it.

    Examples:
        >>> scores.per_prompt.shape
        torch.Size([2, 2, 4])
        >>> best = scores.top(1)[0]
        >>> scores[best] == scores.values.max()
        tensor(True)
    """

    name: str
    """name of the analysis"""
    per_prompt: Float32[Tensor, "n l h"]
    """score of each head on each prompt; NaN where a prompt does not count"""
    unit: str = ""
    """unit of the scores"""
    kv_heads: int | None = None
    """key-value heads of a layer; None for as many as query heads"""
    threshold: float | None = None
    """score above which a head has the role that the analysis measures"""
    settings: dict[str, Any] = field(default_factory=dict)
    """settings of the analysis, as JSON returns them"""
    provenance: Provenance | None = None
    """the model, tokenizer and versions that the scores come from"""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """further results, `[n l h ...]` each"""
    seed: int = 0
    """seed of the bootstrap"""
    labels: tuple[str, ...] = ()
    """one text for each prompt, or none"""

    def __post_init__(self) -> None:
        try:
            given = torch.as_tensor(self.per_prompt)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScoreError(
                f"scores '{self.name}' are not numbers ({error}); give [prompts, layers, heads]."
            ) from None
        if given.ndim != 3 or not given.numel():
            raise ScoreError(f"scores '{self.name}' have shape {list(given.shape)}; give [prompts, layers, heads].")
        if given.isinf().any():
            raise ScoreError(
                f"scores '{self.name}' hold an infinite value; give numbers, or NaN where a prompt does not count."
            )
        settings, labels = storage.plain(self.settings, f"settings of '{self.name}'"), tuple(map(str, self.labels))
        if labels and len(labels) != len(given):
            raise ScoreError(
                f"scores '{self.name}' have {len(labels)} labels for {len(given)} prompts; give one for each, or none."
            )
        for key, extra in self.extras.items():
            if extra.shape[:3] != given.shape:
                raise ScoreError(
                    f"extra '{key}' of scores '{self.name}' has shape {list(extra.shape)}; "
                    f"give a tensor whose shape begins with {list(given.shape)}."
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
        """Number of layers."""
        return self.per_prompt.shape[1]

    @property
    def n_heads(self) -> int:
        """Number of query heads of a layer."""
        return self.per_prompt.shape[2]

    @property
    def layout(self) -> HeadLayout:
        """Layers and heads of the table; its head_dim is unknown."""
        return HeadLayout(self.layers, self.n_heads, self.kv_heads or self.n_heads)

    @property
    def counted(self) -> int:
        """Number of prompts that count for at least one head."""
        return int((~self.per_prompt.isnan()).flatten(1).any(1).sum())

    @cached_property
    def values(self) -> Float32[Tensor, "l h"]:
        """Mean over the prompts that count for the head, each with the same weight; NaN where none counts."""
        means = statistics.weighted_means(
            torch.ones(1, len(self.per_prompt), dtype=torch.float64), self.per_prompt.flatten(1)
        )
        return means.view(self.layers, self.n_heads).float()

    def by_group(self, kv_heads: int | None = None) -> Float32[Tensor, "l g"]:
        """The highest score among the query heads of each key-value head, -inf where none has a score.

        Args:
            kv_heads: Number of key-value heads of a layer, by default that of the table.

        Returns:
            Scores `[l g]`.
        """
        return self.values.nan_to_num(-torch.inf).unflatten(1, (kv_heads or self.layout.kv_heads, -1)).amax(-1)

    @cached_property
    def frequency(self) -> Float32[Tensor, "l h"]:
        """Share of the prompts that count for the head in which its score is above 0."""
        active = torch.where(self.per_prompt.isnan(), torch.nan, (self.per_prompt > 0).float())
        return active.nanmean(0)

    def interval(
        self, level: float = 0.95, n_resamples: int = 1000
    ) -> tuple[Float32[Tensor, "l h"], Float32[Tensor, "l h"]]:
        """Interval of the mean by the percentile bootstrap over the prompts that count.

        It is seeded by `seed` and bit-equal in any process, with any number of threads. It is NaN for a head with
        fewer than two prompts that count, since one prompt carries no information about others.

        Args:
            level: Coverage of the interval.
            n_resamples: Number of bootstrap resamples.

        Returns:
            The lower and the upper ends.

        Raises:
            UsageError: If the level is not between 0 and 1, or there is no resample.

        Limits:
            Does not include the error from how the prompts were made.
        """
        if not 0 < level < 1 or n_resamples < 1:
            raise UsageError(
                f"level={level} and n_resamples={n_resamples} make no interval; give a level between 0 and 1 and at "
                "least one resample."
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
        """The k heads with the highest scores, in that order; heads without a score are left out.

        Args:
            k: Number of heads. Ties are in the order of heads.

        Returns:
            The heads.

        Raises:
            UsageError: If k is negative.
        """
        if k < 0:
            raise UsageError(f"k={k} is no number of heads; give 0 or more.")
        flat = self.values.flatten()
        order = flat.nan_to_num(nan=-math.inf).sort(descending=True, stable=True).indices.tolist()
        return [Head(*divmod(i, self.n_heads)) for i in order[:k] if not flat[i].isnan()]

    def heads(self, *, top: int | None = None, above: float | None = None) -> HeadSet:
        """The heads with the highest scores, those above a value, or both; by default those above the threshold.

        Args:
            top: Number of heads.
            above: Value that the score exceeds.

        Returns:
            HeadSet: the heads.

        Raises:
            UsageError: If neither is given and the table has no threshold.
        """
        if top is None and above is None:
            if self.threshold is None:
                raise UsageError(f"scores '{self.name}' have no threshold; call heads(top=10) or heads(above=0.1).")
            above = self.threshold
        chosen = HeadSet(tuple(self.top(self.layers * self.n_heads if top is None else top)))
        return chosen if above is None else chosen & HeadSet.from_mask(self.values > above)

    select = heads

    def random_like(self, heads: HeadSet | int, seed: int, match: Literal["free", "layer"] = "free") -> HeadSet:
        """As many random heads as a head set has, none of which is in it.

        Args:
            heads: The head set, or the number of heads from the top of the table.
            seed: Seed of the draw.
            match: "layer" draws as many from each layer as the head set has there, "free" from all layers.

        Returns:
            HeadSet: the random heads.
        """
        chosen = self.heads(top=heads) if isinstance(heads, int) else heads
        return chosen.random_like(self.layout, seed, match)

    def compare(self, other: "HeadScores", k: int = 10, n_permutations: int = 1000, seed: int = 0) -> Comparison:
        """Correlations over the heads that both tables score, and the overlap of their top k compared with chance.

        Args:
            other: A table of the same shape.
            k: Length of the lists that overlap.
            n_permutations: Number of permutations of the heads of one table, for the p value.
            seed: Seed of the permutations.

        Returns:
            Comparison: Correlations, overlap, expected overlap and p value.

        Raises:
            ScoreError: If the tables differ in shape.
            UsageError: If k is not between 1 and the number of heads that both score.

        Examples:
            >>> scores.compare(scores, k=2).overlap
            2

        Limits:
            Shows that both rank the heads alike, not that the heads do the same.
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
            raise UsageError(f"k={k} for {len(mine)} scored heads; give a k from 1 to {len(mine)}.")
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
        """The prompts of all parts in one table.

        Args:
            parts: Tables of one analysis and model. Extras of different lengths are padded with NaN, -1 or False.

        Returns:
            HeadScores: the joined table.

        Raises:
            ScoreError: If there are no parts, or they differ in name, shape, settings or model.
        """
        if not parts:
            raise ScoreError("no scores to join; give at least one table.")
        first = parts[0]
        for part in parts[1:]:
            for key in ("name", "unit", "layers", "n_heads", "kv_heads", "threshold", "settings"):
                if getattr(part, key) != getattr(first, key):
                    raise ScoreError(
                        f"scores differ in {key} ({getattr(first, key)!r} and {getattr(part, key)!r}); "
                        "join parts of one analysis of one model."
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
        """One line about the table, then the heads with the highest scores and their intervals, one a line.

        Args:
            top: Number of heads.
        """
        limit = "" if self.threshold is None else f", {len(self.heads())} heads above {self.threshold:g}"
        lines = [f"{self.name}: {self.unit}, {self.counted} prompts counted{limit}"]
        lines += [f"  {text}" for text in (sentence_of_scores(self.extras, self.settings),) if text]
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
        best = "".join(f", top {self._described(head)}" for head in self.top(1))
        return f"HeadScores({self.name!r}, {self.layers}x{self.n_heads}, n={self.counted}{best})"

    def _described(self, head: Head) -> str:
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
