"""The cost of a run before it is paid: forward passes, tokens, arithmetic, memory of results and of activations."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from interp.analyses.costs import Cost
from interp.analyses.memory import free_memory
from interp.errors import CostError
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture_cost import format_bytes
from interp.runs.plan import Plan
from interp.runs.stage import Stage


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
    """the stages of the run"""
    free_megabytes: float = math.inf
    """memory that is free on the devices of the model"""

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
        sums = {"tokens": self.tokens, "teraflops": round(self.teraflops, 3)}
        return {"stages": rows, **sums, "free_megabytes": round(self.free_megabytes, 1), "excess": list(self.excess)}

    @property
    def excess(self) -> tuple[str, ...]:
        """A sentence for each stage whose activations exceed the free memory, at which the run would stop."""
        return tuple(
            sentence for row in self.stages if (sentence := excess(row.name, row.cost, self.free_megabytes * 1e6))
        )

    def __str__(self) -> str:
        head = (
            f"{'stage':32s} {'prompts':>8s} {'forwards':>9s} {'tokens':>10s} {'TFLOP':>9s} {'results, MB':>12s} "
            f"{'activations, MB':>16s}"
        )
        rows = [
            f"{stage.name:32s} {stage.n_prompts:8,d} {stage.cost.forward_passes:9,.0f} {stage.cost.tokens:10,.0f} "
            f"{stage.cost.teraflops:9.2f} {stage.cost.held_megabytes:12.1f} "
            f"{f'{stage.cost.activation_megabytes:,.1f}' if stage.cost.activation_megabytes else '-':>16s}"
            for stage in self.stages
        ]
        sums = f"{'total':32s} {'':8s} {'':9s} {self.tokens:10,.0f} {self.teraflops:9.2f}"
        return "\n".join([head, *rows, sums, *self.excess])


def estimate(plan: Plan, model: nn.Module, tokenizer: Any, own: Prompts | None = None) -> Estimate:
    """The cost of a plan on one model, without running it.

    Each stage is counted by the cost that its analysis or control declares. The column of activations holds the memory
    on the device of the model, in addition to its weights, of stages that need more than a forward pass: those with a
    backward pass, and sweeps.

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
    return Estimate(tuple(found), free_memory(model) / 1e6)


def check_memory(stages: Iterable[Stage], model: nn.Module) -> None:
    """Check that the activations of every stage fit into the free memory of the model's devices.

    Args:
        stages: The stages of a run that are not made yet. Those whose errors are recorded are left out.
        model: The model.

    Raises:
        CostError: If those of a stage do not fit.
    """
    free = free_memory(model)
    for stage in stages:
        if stage.cost is None or stage.optional:
            continue
        if sentence := excess(stage.name, stage.cost(model), free):
            raise CostError(sentence)


def excess(name: str, cost: Cost, free: float) -> str:
    """A sentence where the activations of a stage exceed the free bytes.

    Args:
        name: Name of the stage.
        cost: Its cost.
        free: Free bytes.

    Returns:
        The sentence; "" where the activations fit.
    """
    needed = cost.activation_megabytes * 1e6
    if needed <= free:
        return ""
    return (
        f"{name} needs {format_bytes(needed)} for activations and {format_bytes(free)} is free: give a smaller "
        "batch size or shorter prompts, or a device with more memory."
    )
