"""Trial: one run of a model on all prompts of a task under one condition, and the names of the common conditions."""

from dataclasses import dataclass, field

from interp.analyses.results.codec import result
from interp.hooks.model.heads import HeadSet

BASELINE = "baseline"
"""condition of the unmodified model"""
RANDOM, RANDOM_BY_LAYER = "random", "random by layer"
"""conditions of random heads: drawn freely, and as many from each layer as the tested set has"""


@result
@dataclass(frozen=True)
class Trial:
    """One run of the model on all prompts of a task, under one condition."""

    condition: str
    """"baseline", "random", "random by layer", or the name of what is tested"""
    values: dict[str, tuple[float, ...]] = field(repr=False)
    """measure -> one number for each prompt, or a single number with an interval"""
    heads: HeadSet = field(default_factory=lambda: HeadSet(()))
    """heads that are ablated or edited"""
    size: float = 0.0
    """number of heads, share of heads, or share of the keys that is kept"""
    draw: int = 0
    """number of the draw of random heads, from 0"""
    task: str = ""
    """name of the task, where there are several"""
    replies: tuple[str, ...] = field(default=(), repr=False)
    """text that the model generated, one for each prompt"""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)
    """measure -> 95 % interval, for a measure that is not a mean over prompts"""
    facts: dict[str, float] = field(default_factory=dict, repr=False)
    """other numbers about the run, such as the share of keys that was kept"""
