"""HeadScores: one number for each head and prompt, with intervals and provenance; the result of head identification."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float32, Float64, Int
from torch import Tensor

from interp.analyses.results import head_scores_parts, head_scores_text, intervals, leading, table_statistics
from interp.analyses.results.codec import result
from interp.analyses.results.comparison import Comparison, compare
from interp.analyses.results.leading import Count, LeadingHead
from interp.analyses.results.result import Result
from interp.analyses.results.statistics import weighted_means
from interp.errors import UsageError
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
        given = (self.per_prompt, self.kv_heads, self.settings, self.extras, self.labels)
        for key, value in head_scores_parts.checked(self.name, *given).items():
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

    @property
    def n_scored(self) -> int:
        """Number of heads with a score; a head without a prompt that counts has none."""
        return int((~self.values.isnan()).sum())

    @cached_property
    def values(self) -> Float32[Tensor, "l h"]:
        """Mean over the prompts that count for the head, each with the same weight; NaN where none counts."""
        means = weighted_means(torch.ones(1, len(self.per_prompt), dtype=torch.float64), self.per_prompt.flatten(1))
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
        """Interval of the mean over the prompts that count: Student's t below 20 prompts, else a widened bootstrap.

        It is seeded by `seed` and bit-equal in any process, with any number of threads. It is NaN for a head with
        fewer than two prompts that count, since one prompt carries no information about others. A head with the same
        score on all prompts has the interval of an exact count where all scores are from 0 to 1, else NaN.

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
        values = self.per_prompt.flatten(1)
        ends = intervals.column_intervals(values, level, n_resamples, self.seed, bounds=intervals.bounds_of(values))
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

    @cached_property
    def _order(self) -> tuple[Int[Tensor, "x"], int]:
        """Places of all heads in order, and how many of them have a rank."""
        # tables break ties differently, so that tied heads are shared by chance alone
        content = hashlib.sha256(self.values.numpy().tobytes() + str(self.seed).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(content[:7], "big"))
        order, ranked = table_statistics.order_of(self.values.flatten()[None], generator)
        return order[0], int(ranked)

    @cached_property
    def floor(self) -> float:
        """The score at or below which heads are never ranked; -inf where every scored head has a rank.

        It is 0 in a table without negative scores, and where a tenth of the heads, at least two, score exactly 0.
        Otherwise it is the lowest score, if a tenth of the heads, at least two, share it.
        """
        return float(table_statistics.floors(self.values.flatten()[None]))

    @property
    def n_unranked(self) -> int:
        """Number of scored heads at or below the floor."""
        return int((self.values <= self.floor).sum())

    def top(self, k: int = 10, *, unranked: bool = False) -> list[Head]:
        """The k heads with the highest scores, in that order; heads at the floor or without a score are left out.

        Ties are in a random order, which depends on the seed and on the scores of the table.

        Args:
            k: Number of heads; fewer are returned where fewer are above the floor.
            unranked: Let heads at the floor follow, in a random order.

        Returns:
            The heads.

        Raises:
            UsageError: If k is negative.
        """
        if k < 0:
            raise UsageError(f"k={k} is no number of heads; give 0 or more.")
        order, ranked = self._order
        ranked = int((~self.values.isnan()).sum()) if unranked else ranked
        return [Head(*divmod(i, self.n_heads)) for i in order[: min(k, ranked)].tolist()]

    def heads(self, *, top: int | None = None, above: float | None = None) -> HeadSet:
        """The heads with the highest scores, those above a value, or both; by default those above the threshold.

        Args:
            top: Number of heads, see `top`.
            above: Value that the score exceeds.

        Returns:
            HeadSet: the heads.

        Raises:
            UsageError: If neither is given and the table has no threshold.
        """
        chosen = self.layout.all() if top is None else HeadSet(tuple(self.top(top)))
        if top is not None and above is None:
            return chosen
        return chosen & HeadSet.from_mask(self.values > self._threshold_or(above))

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

    def adjusted_p(self, threshold: float | None = None) -> Float64[Tensor, "l h"]:
        """The p-value of each head for a mean above a threshold, adjusted for all heads of the table.

        The tests are exact for scores of 0 and 1, and Gaffke's for all other scores of at least 0; see
        `table_statistics.p_values_above`. Benjamini and Hochberg's method adjusts them, so that of the heads with a
        value of at most 0.05, 5 % on average are not above the threshold.

        Args:
            threshold: Score that the mean exceeds, by default the threshold of the table.

        Returns:
            Adjusted p-values `[l h]`, NaN for heads without a score.

        Raises:
            UsageError: If no threshold is given and the table has none.
        """
        p = table_statistics.p_values_above(self.per_prompt.flatten(1), self._threshold_or(threshold))
        return table_statistics.benjamini_hochberg(p).view(self.layers, self.n_heads)

    def confident(self, threshold: float | None = None, level: float = 0.05) -> HeadSet:
        """The heads that are above a threshold with a controlled false discovery rate, see `adjusted_p`.

        Args:
            threshold: Score that the mean exceeds, by default the threshold of the table.
            level: Share of these heads that are not above the threshold, on average and at most.

        Returns:
            HeadSet: the heads.
        """
        return HeadSet.from_mask(self.adjusted_p(threshold) <= level)

    def threshold_curve(self, thresholds: Sequence[float] | None = None) -> tuple[Count, ...]:
        """How many heads are above each of several thresholds, and how many of them confidently.

        Args:
            thresholds: Scores, by default 19 at equal steps between 0 and the highest score, and the threshold.

        Returns:
            For each threshold: its value, the number of heads with a higher score, and the number of heads in
            `confident(threshold)`.

        Examples:
            >>> [found.above for found in scores.threshold_curve((-1.0, 2.0))]
            [8, 0]
        """
        return leading.threshold_curve(self, thresholds)

    @cached_property
    def split_half(self) -> float:
        """Mean rank correlation of the heads above the floor between random halves of the prompts.

        NaN for fewer than two prompts, or fewer than three such heads.
        """
        ranked = self.per_prompt[:, self.values > self.floor]
        return table_statistics.split_half_correlation(ranked, seed=self.seed)

    def leading(self, k: int = 10) -> tuple[LeadingHead, ...]:
        """The heads of `top(k)` with their held-out scores and the stability of their rank.

        The score of a head that was chosen for it is too high. For the held-out score, one half of the prompts picks
        the head for this rank, and the other half scores it: the mean over random splits, with each half picking once.

        Args:
            k: Number of heads.

        Returns:
            For each head: head, value, low, high, held_out, and top_share, the share of the bootstrap resamples of the
            prompts in which it is in the top k.
        """
        return leading.leading(self, k)

    def depth_profile(self) -> "HeadScores":
        """A table in which every head scores the mean of its layer: the ranking by depth alone, as a baseline.

        Returns:
            HeadScores: the table; heads of one layer tie, and their order is random.
        """
        means = self.per_prompt.nanmean(2, keepdim=True).expand_as(self.per_prompt)
        return replace(self, name=f"{self.name}_depth", per_prompt=means, threshold=None, extras={})

    def compare(self, other: "HeadScores", k: int = 10) -> Comparison:
        """Correlations over the heads that both tables score, and the overlap of their top k compared with chance.

        The p-value permutes the heads within each layer, since heads with one job are in few layers. Heads at the
        floor of a table are in no list, so a list may be shorter than k.

        Args:
            other: A table of the same shape.
            k: Length of the lists that overlap.

        Returns:
            Comparison: Correlations, overlap, the overlaps expected over all heads, within layers and with the depth
                profile of the other table, and p.

        Raises:
            ScoreError: If the tables differ in shape.
            UsageError: If k is not between 1 and the number of heads that both score.

        Examples:
            >>> scores.compare(scores, k=2).overlap
            2

        Limits:
            Shows that both rank the heads alike, not that the heads do the same.
        """
        return compare(self, other, k)

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row per head: layer, head, name, value, low, high, frequency."""
        return head_scores_text.frame(self)

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
        return cls(**head_scores_parts.joined(parts))

    def summary(self, top: int = 10) -> str:
        """Lines about the table, then the heads with the highest scores, one a line.

        A line has the score, its interval, the held-out score, and how often the head is in the list if the prompts
        are resampled. "Confident" is controlled over all heads of the table, see `adjusted_p`.

        Args:
            top: Number of heads.
        """
        return head_scores_text.summary(self, top)

    def __len__(self) -> int:
        return self.layers * self.n_heads

    def __iter__(self) -> Iterator[Head]:
        return iter(self.layout.all())

    def __getitem__(self, head: Any) -> float:
        found = Head.parse(head)
        self.layout.check(found)
        return float(self.values[found.layer, found.head])

    def __repr__(self) -> str:
        best = "".join(f", top {head_scores_text.described(self, head)}" for head in self.top(1))
        return f"HeadScores({self.name!r}, {self.layers}x{self.n_heads}, n={self.counted}{best})"

    def _repr_html_(self) -> str:
        return head_scores_text.html(self)

    def _threshold_or(self, given: float | None) -> float:
        if given is None and self.threshold is None:
            raise UsageError(f"scores '{self.name}' have no threshold; call heads(top=10) or heads(above=0.1).")
        return float(self.threshold or 0.0) if given is None else given
