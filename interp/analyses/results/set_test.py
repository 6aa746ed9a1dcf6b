"""The test of a head set against random head sets: its unit is the set, since the set was drawn at random."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from interp.errors import UsageError

N_RANDOM_SETS = 99
"""random head sets of a test by default"""
MIN_RANDOM_SETS = 39
"""random head sets below which there is no verdict"""
MIN_COUNTED_PROMPTS = 10
"""prompts below which there is no verdict about a share of prompts"""
ALPHA = 0.05
"""p-value up to which a set is beyond the random sets"""
Claim = Literal["larger effect", "smaller effect", "higher"]
"""how the tested set is claimed to differ from random sets: in the size of its effect, or by its value"""
CLAIMS: tuple[Claim, ...] = ("larger effect", "smaller effect", "higher")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class SetTest:
    """The measure under a tested head set, compared with the measure under each of many random sets.

    `p = (1 + k) / (1 + n)` with `k` of `n` random sets at least as extreme as the tested set.

    Where more than 39 sets are planned, the draws end early in two cases. They end after 39 sets if none of these is as
    extreme: `p = 1 / 40`. They end at the k-th set that is as extreme if no further set can give `p <= 0.05`:
    `p = k / n`. Draws that went past 39 sets had a chance to end there, and their p-value includes it: it is the
    probability to end after 39 sets, or not to end there and to have at most k sets as extreme among all of them.

    Source:
        Davison and Hinkley 1997, section 4.2; Besag and Clifford 1991 (early end at the k-th set); Jennison and
        Turnbull 1999, section 8.4 (p-values that order results by the stage at which they ended).

    Limits:
        Exact where the tested heads were chosen without this measure on these prompts. Where several head sets are
        tested, the draws never end after 39 sets for want of an extreme one; the p-value of a set with an extreme one
        among the first 39 is then too large, by at most 0.009 with 99 sets.
    """

    difference: float
    """value of the tested set minus mean of the random sets, in the unit of the measure"""
    deviations: float
    """the difference in standard deviations of the random sets; NaN where they do not differ"""
    n_sets: int
    """number of random sets"""
    n_beyond: int
    """number of random sets that are less extreme than the tested set"""
    n_planned: int
    """number of random sets, had the draws not ended early"""
    n_beyond_first: int = 0
    """number of the first 39 random sets that are less extreme than the tested set"""

    @property
    def p_value(self) -> float:
        """Probability of a random set that is at least as extreme, if the tested set were one of them."""
        n, reached = self.n_sets, self.n_sets - self.n_beyond
        if self.ended_early and reached:
            return reached / n
        plain = (1 + reached) / (1 + n)
        if n <= MIN_RANDOM_SETS or self.n_beyond_first == MIN_RANDOM_SETS:
            return plain
        # of results with j sets as extreme, the share in which none of these is among the first 39
        ended = sum(math.comb(n - MIN_RANDOM_SETS, j) / math.comb(n, j) for j in range(reached + 1))
        return plain + 1 / (1 + MIN_RANDOM_SETS) - ended / (1 + n)

    @property
    def ended_early(self) -> bool:
        """Whether the draws ended before the planned number."""
        return self.n_sets < self.n_planned

    @property
    def decided(self) -> bool:
        """Whether there are enough random sets for a verdict."""
        return self.n_sets >= MIN_RANDOM_SETS or (self.ended_early and self.n_planned >= MIN_RANDOM_SETS)

    @property
    def is_beyond(self) -> bool:
        """Whether the tested set differs from random sets, `p <= 0.05` with at least 39 sets."""
        return self.decided and self.p_value <= ALPHA


def set_test(
    tested: float, random: Sequence[float], baseline: float, claim: Claim = "larger effect", n_planned: int = 0
) -> SetTest:
    """Compare the value of a tested head set with the values of random sets.

    Args:
        tested: Mean of the measure under the tested set.
        random: Mean of the measure under each random set, in the order of the draws.
        baseline: Mean of the measure on the unmodified model.
        claim: "larger effect" and "smaller effect" compare distances from the baseline, "higher" values.
        n_planned: Number of random sets, had the draws not ended early; by default their number.

    Raises:
        UsageError: If there is no random set, or the claim is unknown.

    Examples:
        >>> from interp.analyses.results.set_test import set_test
        >>> found = set_test(0.1, [0.9] * 98 + [0.0], baseline=1.0)
        >>> found.n_beyond, found.p_value, found.is_beyond
        (98, 0.02, True)
    """
    if not len(random):
        raise UsageError("there are no random head sets to compare with; give the value of at least one.")
    own, others = extremeness(tested, baseline, claim), [extremeness(value, baseline, claim) for value in random]
    mean = sum(random) / len(random)
    spread = math.sqrt(sum((value - mean) ** 2 for value in random) / max(1, len(random) - 1))
    return SetTest(
        difference=tested - mean,
        deviations=(tested - mean) / spread if spread > 1e-12 * abs(mean) else math.nan,
        n_sets=len(random),
        n_beyond=sum(other < own for other in others),
        n_beyond_first=sum(other < own for other in others[:MIN_RANDOM_SETS]),
        n_planned=max(n_planned, len(random)),
    )


def is_settled(
    tested: float,
    random: Sequence[float],
    baseline: float,
    claim: Claim,
    n_planned: int,
    *,
    first_look: bool = True,
) -> bool:
    """Whether the draws end: the first 39 sets are all less extreme, or so many are not that no more sets can help.

    Args:
        tested: As in `set_test`.
        random: As in `set_test`, so far.
        baseline: As in `set_test`.
        claim: As in `set_test`.
        n_planned: Number of random sets that are planned.
        first_look: Whether draws end after 39 sets if none is as extreme.
    """
    own = extremeness(tested, baseline, claim)
    reached = sum(extremeness(value, baseline, claim) >= own for value in random)
    if not reached:
        return first_look and len(random) == MIN_RANDOM_SETS < n_planned
    return reached >= math.floor(ALPHA * (1 + n_planned)) and n_planned >= MIN_RANDOM_SETS


def extremeness(value: float, baseline: float, claim: Claim) -> float:
    """The number by which sets are ordered: the more extreme, the larger.

    Args:
        value: Mean of the measure under a set.
        baseline: Mean of the measure on the unmodified model.
        claim: As in `set_test`.
    """
    if claim not in CLAIMS:
        raise UsageError(f"unknown claim {claim!r}; choose from {', '.join(map(repr, CLAIMS))}.")
    if claim == "higher":
        return value
    return abs(value - baseline) if claim == "larger effect" else -abs(value - baseline)


def beyond_together(tests: Mapping[Key, SetTest]) -> tuple[Key, ...]:
    """The tested sets that are beyond random sets after a correction for the number of tests.

    The correction is that of Benjamini and Hochberg: of the sets that are returned, at most 5 % on average are not
    beyond random sets, and without any effect a set is returned in at most 5 % of the cases.

    Args:
        tests: Tests of one table, by any key; tests without a verdict are left out.

    Returns:
        Keys of the sets, in the given order.

    Limits:
        The smallest p-value of n random sets is `1 / (1 + n)`. With few sets and many tests, several tested sets have
        to be beyond all random sets before one is returned.

    Examples:
        >>> from interp.analyses.results.set_test import beyond_together, set_test
        >>> far, near = set_test(9.0, [1.0] * 99, baseline=0.0), set_test(0.5, [1.0] * 99, baseline=0.0)
        >>> beyond_together({"far": far, "near": near})
        ('far',)
    """
    # the options of commands come from plans, which name the defaults of this module, and --help imports no torch
    import torch

    from interp.analyses.results.table_statistics import benjamini_hochberg

    decided = {key: test.p_value for key, test in tests.items() if test.decided}
    adjusted = benjamini_hochberg(torch.tensor(list(decided.values()), dtype=torch.float64)).tolist()
    # a product that is 0.05 but for rounding counts
    return tuple(key for key, p in zip(decided, adjusted, strict=True) if p <= ALPHA + 1e-12)
