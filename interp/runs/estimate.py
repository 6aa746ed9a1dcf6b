"""The cost of a run before it is paid: forward passes, tokens, arithmetic, memory of the results."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from interp.analyses.costs import Cost
from interp.hooks.prompts.prompts import Prompts
from interp.runs.plan import Plan


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage."""

    name: str
    n_prompts: int
    cost: Cost


@dataclass(frozen=True)
class Estimate:
    """The cost of a run by stage."""

    stages: tuple[StageCost, ...]

    @property
    def tokens(self) -> float:
        """Tokens of all forward passes."""
        return sum(stage.cost.tokens for stage in self.stages)

    @property
    def teraflops(self) -> float:
        """Floating-point operations, in units of 10^12."""
        return sum(stage.cost.teraflops for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON can hold it."""
        rows = [{"name": stage.name, "n_prompts": stage.n_prompts, **asdict(stage.cost)} for stage in self.stages]
        return {"stages": rows, "tokens": self.tokens, "teraflops": round(self.teraflops, 3)}

    def __str__(self) -> str:
        head = f"{'stage':32s} {'prompts':>8s} {'forwards':>9s} {'tokens':>10s} {'TFLOP':>9s} {'results, MB':>12s}"
        rows = [
            f"{stage.name:32s} {stage.n_prompts:8,d} {stage.cost.forward_passes:9,.0f} {stage.cost.tokens:10,.0f} "
            f"{stage.cost.teraflops:9.2f} {stage.cost.held_megabytes:12.1f}"
            for stage in self.stages
        ]
        return "\n".join([head, *rows, f"{'total':32s} {'':8s} {'':9s} {self.tokens:10,.0f} {self.teraflops:9.2f}"])


def estimate(plan: Plan, model: nn.Module, tokenizer: Any, own: Prompts | None = None) -> Estimate:
    """The cost of a plan on one model, without running it.

    Each stage is counted by the cost that its analysis or control declares.

    Args:
        plan: The plan of a run.
        model: The model that would be run.
        tokenizer: Its tokenizer.
        own: Prompts that take the place of the standard ones.

    Returns:
        Estimate: a `StageCost` for each stage that declares its cost.

    Limits:
        Operations are counted, not timed. Replies are counted at their full length.
    """
    found = []
    for stage in plan.stages(model, tokenizer, own):
        if stage.cost is not None:
            n_prompts = sum(len(prompts) for prompts, _ in stage.prompts[:1])
            found.append(StageCost(stage.name, n_prompts, stage.cost(model)))
    return Estimate(tuple(found))
