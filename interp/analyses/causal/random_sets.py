"""Random head sets: as many heads as a tested set has, drawn from all layers or by layer, until a test is settled."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.set_test import Claim, is_settled
from interp.analyses.results.trial import OF_TESTED_SET, RANDOM, RANDOM_BY_LAYER, RANDOM_KEPT, Trial
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet, permute_in_layers

N_FREE_SETS = 3
"""random head sets at most that are drawn from all layers, which describe the model and test nothing"""
FROM_OTHER_LAYERS = "heads from other layers"
"""fact of a trial: heads that their layer could not provide, taken from the nearest layers that could"""
Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Condition:
    """Heads that are ablated together, and the name under which their trial is stored."""

    name: str
    """"baseline", "random", "random by layer", "random kept", or the name of a tested set"""
    heads: HeadSet
    draw: int = 0
    """number of the draw of random heads, from 0"""
    facts: dict[str, float] = field(default_factory=dict, compare=False)
    """numbers about the draw"""
    n_tested: int | None = None
    """number of tested heads, where it is not the number of ablated heads"""

    @property
    def size(self) -> int:
        """Number of heads that are tested: the ablated ones, or those that are kept while others are ablated."""
        return len(self.heads) if self.n_tested is None else self.n_tested


@dataclass(frozen=True)
class RandomSets:
    """Random head sets that a tested head set is compared with.

    Args:
        heads: The tested heads.
        layout: Layers and heads of the model.
        n: Number of sets that are matched by layer. Up to 3 sets of other heads are also drawn, from all layers.
        seed: Seed of the run; draws differ by name and size.
        name: Name of the tested set.
        exclude: Further heads that are not drawn, such as heads that have the tested role as well. A layer with too few
            others draws them nevertheless, see `permuted`.
        stop_early: Whether draws end where the verdict is certain, see `SetTest`.
        is_single: Whether no other head set is tested in the same experiment. Otherwise draws do not end after 39 sets,
            whose p-value would be too large to correct for several tests.

    Raises:
        UsageError: If there are no heads or no random sets.
        HeadError: If too few heads are left to draw from.
    """

    heads: HeadSet
    layout: HeadLayout
    n: int
    seed: int = 0
    name: str = ""
    exclude: HeadSet = field(default_factory=HeadSet)
    stop_early: bool = True
    is_single: bool = True

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"n_random_sets={self.n} leaves no control; give at least 1 set of random heads.")
        if not len(self.heads):
            raise UsageError(
                "there are no heads to ablate: the set is empty, or no head scores above 0 (as where the model "
                "answered no prompt); name heads, or give other scores."
            )

    def free(self) -> list[Condition]:
        """Sets that are drawn from all layers."""
        return [
            Condition(RANDOM, self.heads.random_like(self.layout, self._seed(draw), "free", self.exclude), draw)
            for draw in range(min(self.n, N_FREE_SETS))
        ]

    def permuted(self) -> Iterator[Condition]:
        """Sets by a random permutation of the heads within each layer, for a test.

        They may share heads with the tested set: if sets of a layer with few heads left the tested ones out, random
        heads would differ from them in up to 17 % of the cases, where 5 % are stated.

        A layer leaves out the excluded heads only if it has as many other heads as tested ones. Otherwise the sets
        would be little else than the tested set.
        """
        tested, taken = self.heads.by_layer(), (self.exclude | self.heads).by_layer()
        full = {layer for layer, own in tested.items() if self.layout.heads - len(taken[layer]) < len(own)}
        fixed = HeadSet(tuple(head for head in self.exclude - self.heads if head.layer not in full))
        for draw in range(self.n):
            (heads,) = permute_in_layers([self.heads], self.layout, self._seed(draw), fixed)
            shared = len(heads & self.heads)
            yield Condition(RANDOM_BY_LAYER, heads, draw, {OF_TESTED_SET: shared} if shared else {})

    def by_layer(self) -> Iterator[Condition]:
        """Sets of other heads, as many of each layer as the tested set has, as far as a layer has so many others."""
        own = {layer: len(heads) for layer, heads in self.heads.by_layer().items()}
        for draw in range(self.n):
            heads = self.heads.random_like(self.layout, self._seed(draw), "layer", self.exclude)
            moved = sum(max(0, len(found) - own.get(layer, 0)) for layer, found in heads.by_layer().items())
            yield Condition(RANDOM_BY_LAYER, heads, draw, {FROM_OTHER_LAYERS: moved} if moved else {})

    def run(
        self,
        measure: Callable[[Condition], Trial],
        baseline: Trial,
        tested: Trial,
        claim: Claim = "larger effect",
        *,
        free: bool = True,
        every_measure: bool = False,
    ) -> list[Trial]:
        """The trials of all sets of a test. The permuted sets end where no further set can change the verdict.

        Args:
            measure: Function of a condition that returns its trial.
            baseline: Trial of the unmodified model.
            tested: Trial of the tested set.
            claim: How the tested set is claimed to differ, see `set_test`.
            free: Draw sets from all layers too.
            every_measure: Draw until the verdict on every measure is certain, in place of the first.
        """
        trials = [measure(condition) for condition in self.free()] if free else []

        def ended(values: Sequence[Trial]) -> bool:
            return self.stop_early and settled(
                values, self.n, baseline, tested, claim, every_measure=every_measure, first_look=self.is_single
            )

        trials += drawn(measure, self.permuted(), ended)
        return [replace(trial, matched=self.name) for trial in trials]

    def _seed(self, draw: int) -> int:
        return seed_of(self.seed, self.name, self.heads, draw)


@dataclass(frozen=True)
class KeptSets:
    """Random heads of a role that are kept, while all other heads of the role are ablated.

    They are the control of heads that are claimed to suffice: the tested heads are one choice of as many heads of the
    role, and each random set is another.

    Args:
        heads: The tested heads.
        role: All heads of the role, among them the tested ones.
        n: Number of random sets.
        seed: Seed of the run; draws differ by name and size.
        name: Name of the condition in which the tested heads are kept.
    """

    heads: HeadSet
    role: HeadSet
    n: int
    seed: int = 0
    name: str = ""

    def run(
        self, measure: Callable[[Condition], Trial], baseline: Trial, tested: Trial, *, every_measure: bool = False
    ) -> list[Trial]:
        """The trials of all sets; see `RandomSets.run`. The kept heads are claimed to preserve more than random ones.

        Args:
            measure: Function of a condition that returns its trial.
            baseline: Trial of the unmodified model.
            tested: Trial in which the tested heads are kept.
            every_measure: Draw until the verdict on every measure is certain, in place of the first.
        """

        def ended(values: Sequence[Trial]) -> bool:
            return settled(values, self.n, baseline, tested, "smaller effect", every_measure=every_measure)

        trials = drawn(measure, self.conditions(), ended)
        return [replace(trial, matched=self.name) for trial in trials]

    def conditions(self) -> Iterator[Condition]:
        """As many heads of the role as are tested, drawn at random; all others of the role are ablated."""
        heads = list(self.role)
        for draw in range(self.n):
            chooser = random.Random(seed_of(self.seed, self.name, self.heads, draw))
            kept = HeadSet(tuple(chooser.sample(heads, len(self.heads))))
            yield Condition(RANDOM_KEPT, self.role - kept, draw, n_tested=len(kept))


def drawn(
    measure: Callable[[Drawn], Trial], conditions: Iterable[Drawn], ended: Callable[[Sequence[Trial]], bool]
) -> list[Trial]:
    """The trials of random sets, until they end.

    Args:
        measure: Function of a condition that returns its trial.
        conditions: The random sets.
        ended: Function of the trials so far that returns whether the draws end.
    """
    trials: list[Trial] = []
    for condition in conditions:
        trials.append(measure(condition))
        if ended(trials):
            break
    return trials


def settled(
    trials: Sequence[Trial],
    n: int,
    baseline: Trial,
    tested: Trial,
    claim: Claim,
    *,
    every_measure: bool = False,
    first_look: bool = False,
) -> bool:
    """Whether the verdict is certain, see `is_settled`.

    Args:
        trials: Trials of the random sets so far.
        n: Number of random sets that are planned.
        baseline: Trial of the unmodified model.
        tested: Trial of the tested set.
        claim: How the tested set is claimed to differ, see `set_test`.
        every_measure: Whether the verdict on every measure has to be certain, in place of the first.
        first_look: Whether draws end after 39 sets if none is as extreme.
    """
    names = list(trials[0].values)
    return all(
        is_settled(
            mean(tested, name), [mean(trial, name) for trial in trials], mean(baseline, name), claim, n,
            first_look=first_look,
        )
        for name in (names if every_measure else names[:1])
    )  # fmt: skip


def seed_of(seed: int, name: str, heads: HeadSet, draw: int) -> int:
    """The seed of one draw.

    Args:
        seed: Seed of the run.
        name: Name of the tested set.
        heads: The tested heads.
        draw: Number of the draw.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}|{name}|{heads}|{draw}".encode()).digest()[:6])


def excluded(scores: HeadScores, heads: HeadSet) -> HeadSet:
    """Heads above the threshold of a table, which are no control for its top heads.

    Args:
        scores: The table.
        heads: The tested heads.

    Returns:
        HeadSet: Empty where the table has no threshold, or too few heads are below it to draw from.
    """
    if scores.threshold is None:
        return HeadSet(())
    found = scores.heads()
    left = scores.layout.size - len(found | heads)
    return found if left >= 2 * len(heads) else HeadSet(())


def role_of(scores: HeadScores, heads: HeadSet) -> HeadSet:
    """All heads of the role that a table measures: those above its threshold, and the given ones.

    A table without a threshold has the heads above its floor.

    Args:
        scores: The table.
        heads: The tested heads.
    """
    found = scores.heads(top=scores.layout.size) if scores.threshold is None else scores.heads()
    return found | heads


def mean(trial: Trial, measure: str | None = None) -> float:
    """Mean over prompts of a measure of a trial.

    Args:
        trial: The trial.
        measure: Name of the measure, by default the first.
    """
    values = next(iter(trial.values.values())) if measure is None else trial.values[measure]
    return sum(values) / len(values)
