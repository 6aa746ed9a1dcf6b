"""What a run will cost, said before it is paid: forward passes, tokens, arithmetic, memory of the results."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from interp.analyses.causal.ablation_test import REPLY
from interp.analyses.kv import KVTask
from interp.analyses.kv.evaluate import SHARES
from interp.analyses.kv.from_scores import PLAIN, makeable
from interp.controls import CONTROLLED, taken
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import context_length
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import Capture
from interp.hooks.read.keep import Keep, at, blocks, columns, top_keys
from interp.studies import Plan, check_prompts, explored_prompt, key_tasks, studies


@dataclass(frozen=True)
class Line:
    """One part of a run."""

    name: str
    prompts: int
    forwards: int
    """of one batch each, decode steps not counted"""
    tokens: int
    teraflops: float
    """floating-point operations in units of 10^12: 2 x parameters x tokens, and attention"""
    megabytes: float
    """results of the largest batch on the host"""


@dataclass(frozen=True)
class Estimate:
    """The cost of a run by part."""

    lines: tuple[Line, ...]

    @property
    def tokens(self) -> int:
        return sum(line.tokens for line in self.lines)

    @property
    def teraflops(self) -> float:
        return sum(line.teraflops for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        rows = [asdict(line) for line in self.lines]
        return {"lines": rows, "tokens": self.tokens, "teraflops": round(self.teraflops, 3)}

    def __str__(self) -> str:
        head = f"{'':22s} {'prompts':>8s} {'forwards':>9s} {'tokens':>10s} {'TFLOP':>9s} {'results, MB':>12s}"
        rows = [
            f"{x.name:22s} {x.prompts:8,d} {x.forwards:9,d} {x.tokens:10,d} {x.teraflops:9.2f} {x.megabytes:12.1f}"
            for x in self.lines
        ]
        return "\n".join([head, *rows, f"{'in all':22s} {'':8s} {'':9s} {self.tokens:10,d} {self.teraflops:9.2f}"])


def estimate(plan: Plan, model: nn.Module, tokenizer: Any, own: Prompts | None = None) -> Estimate:
    """Cost of a plan on one model, without running it.

    Operations are counted, not timed: 2 x parameters per token, 4 x heads x head dim x length^2 / 2 per layer and
    prompt.
    """
    lines = []
    keeps: dict[str, tuple[Keep, int | None]] = {"retrieval": (top_keys(1), REPLY), "sinks": (columns("mean"), None)}
    for study in studies(plan, tokenizer, own):
        keep, queries = keeps.get(study.name, (at(-1), None))
        lines.append(_line(study.name, plan, model, study.prompts, keep, queries, study.reply, 1))
        if plan.check and study.name in CONTROLLED:
            sizes, asked = taken(study.name, study.prompts, plan.k, HeadLayout.of(model))
            # as loaded once, then the top heads and two kinds of random ones
            times = 1 + len(sizes) * (1 + 2 * plan.draws)
            lines.append(_line(f"{study.name}, out", plan, model, asked, None, None, 0, times))
    if plan.checked:
        times = 2 + 2 * plan.draws
        lines.append(_line("causal check", plan, model, check_prompts(plan, tokenizer), None, None, REPLY, times))
    if lines and plan.explore:
        text = explored_prompt(plan, tokenizer, own, context_length(model))
        # once for the explorer, once for what heads write
        lines.append(_line("explorer", plan, model, text, blocks(16), None, 0, 2))
    lines += [_keyed(plan, model, task) for task in key_tasks(plan, tokenizer)]
    return Estimate(tuple(lines))


def _keyed(plan: Plan, model: nn.Module, task: KVTask) -> Line:
    """A context is read once, what comes after it with every key and at each share by each selector."""
    times = 1 + len(SHARES) * (1 + len(PLAIN) + len(makeable(plan.analyses)))
    once, whole = (_line("", plan, model, prompts, None, None, 0, 1) for prompts in (task.contexts, task.whole))
    return Line(
        f"keys, {task.name}", once.prompts, once.forwards * (1 + times),
        once.tokens + times * (whole.tokens - once.tokens),
        once.teraflops + times * (whole.teraflops - once.teraflops), 0.0,
    )  # fmt: skip


def _line(
    name: str,
    plan: Plan,
    model: nn.Module,
    prompts: Prompts,
    keep: Keep | None,
    queries: int | None,
    reply: int,
    times: int,
) -> Line:
    layout = HeadLayout.of(model)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(length + reply for length in prompts.lengths)
    squares = sum(length * length for length in prompts.lengths)
    flops = 2 * parameters * tokens + 2 * layout.layers * layout.heads * layout.head_dim * squares
    held = 0.0
    if keep is not None:
        cost = Capture(model, (keep,)).cost(min(plan.batch_size, len(prompts)), max(prompts.lengths), queries)
        held = cost.total / 1e6
    batches = -(-len(prompts) // plan.batch_size)
    return Line(name, len(prompts), batches * times, tokens * times, flops * times / 1e12, held)
