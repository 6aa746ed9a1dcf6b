"""Random head sets: as many heads as a tested set has, drawn freely or by layer, until a test is settled."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.set_test import Claim, is_settled
from interp.analyses.results.trial import RANDOM, RANDOM_BY_LAYER, Trial
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet, permute_in_layers

N_FREE_SETS = 3
"""random head sets at most that are drawn freely, which describe the model and test nothing"""
FROM_OTHER_LAYERS = "heads from other layers"
"""fact of a trial: heads that their layer could not provide, taken from the nearest layers that could"""
OF_TESTED_SET = "heads of the tested set"
"""fact of a trial: heads of a permuted set that the tested set has too"""


@dataclass(frozen=True)
class Condition:
    """Heads that are ablated together, and the name under which their trial is stored."""

    name: str
    """"baseline", "top", "random" or "random by layer" """
    heads: HeadSet
    draw: int = 0
    """number of the draw of random heads, from 0"""
    facts: dict[str, float] = field(default_factory=dict, compare=False)
    """numbers about the draw"""


@dataclass(frozen=True)
class RandomSets:
    """Random head sets that a tested head set is compared with.

    Args:
        heads: The tested heads.
        layout: Layers and heads of the model.
        n: Number of sets that are matched by layer. Up to 3 are also drawn freely, from the other heads.
        seed: Seed of the run; draws differ by name and size.
        name: Name of the tested set.
        exclude: Further heads that are not drawn, such as heads that have the tested role as well.

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
        """
        for draw in range(self.n):
            (heads,) = permute_in_layers([self.heads], self.layout, self._seed(draw), self.exclude - self.heads)
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
        self, measure: Callable[[Condition], Trial], baseline: float, tested: float, claim: Claim = "larger effect"
    ) -> list[Trial]:
        """The trials of all sets of a test. The permuted sets end where no further set can change the verdict.

        Args:
            measure: Function of a condition that returns its trial.
            baseline: Mean of the first measure on the unmodified model.
            tested: Mean of the first measure under the tested set.
            claim: How the tested set is claimed to differ, see `set_test`.
        """
        trials = [measure(condition) for condition in self.free()]
        values: list[float] = []
        for condition in self.permuted():
            trials.append(measure(condition))
            values.append(mean(trials[-1]))
            if is_settled(tested, values, baseline, claim, self.n):
                break
        return [replace(trial, matched=self.name) for trial in trials]

    def _seed(self, draw: int) -> int:
        text = f"{self.seed}|{self.name}|{self.heads}|{draw}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


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


def mean(trial: Trial) -> float:
    """Mean over prompts of the first measure of a trial.

    Args:
        trial: The trial.
    """
    values = next(iter(trial.values.values()))
    return sum(values) / len(values)
