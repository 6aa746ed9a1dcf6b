"""Trial: one run of a model on all prompts of a task under one condition, and the names of the common conditions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from interp.analyses.results.codec import result
from interp.hooks.model.heads import HeadSet

BASELINE = "baseline"
"""condition of the unmodified model"""
RANDOM, RANDOM_BY_LAYER = "random", "random by layer"
"""conditions of random heads: drawn from all layers, and as many from each layer as the tested set has"""
RANDOM_KEPT = "random kept"
"""condition of random heads of a role that are kept, with all other heads of the role ablated"""
TOP = "top"
"""condition of the tested heads of one table, or of named heads"""
KEPT, BY_DEPTH = "kept", "by depth"
"""ends of conditions, before another ablation in brackets: the tested heads stay and the others of their role are
ablated, and the first heads by the mean score of their layer"""
DRAWN = (RANDOM, RANDOM_BY_LAYER, RANDOM_KEPT)
"""all conditions of random heads"""
OF_TESTED_SET = "heads of the tested set"
"""fact of a trial: heads of a permuted set that the tested set has too"""


@result
@dataclass(frozen=True)
class Trial:
    """One run of the model on all prompts of a task, under one condition."""

    condition: str
    """"baseline", "random", "random by layer", "random kept", or the name of what is tested"""
    values: dict[str, tuple[float, ...]] = field(repr=False)
    """measure -> one number for each prompt, or a single number with an interval"""
    heads: HeadSet = field(default_factory=lambda: HeadSet(()))
    """heads that are ablated or edited"""
    size: float = 0.0
    """number of heads that are tested, share of heads, or share of the keys that is kept"""
    draw: int = 0
    """number of the draw of random heads, from 0"""
    matched: str = ""
    """condition that random heads are matched to; empty where they are a control of all conditions"""
    task: str = ""
    """name of the task, where there are several"""
    replies: tuple[str, ...] = field(default=(), repr=False)
    """text that the model generated, one for each prompt"""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)
    """measure -> 95 % interval, for a measure that is not a mean over prompts"""
    facts: dict[str, float] = field(default_factory=dict, repr=False)
    """other numbers about the run, such as the share of keys that was kept"""


def by_task(trials: Sequence[Trial], rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """One row for each task: the mean over its draws, prompt by prompt.

    Args:
        trials: The trials.
        rows: The numbers of each trial.
    """
    found: dict[str, list[Sequence[float]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        found.setdefault(trial.task, []).append(row)
    return [[sum(column) / len(column) for column in zip(*draws, strict=True)] for draws in found.values()]
