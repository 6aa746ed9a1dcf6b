"""The control behind "these heads matter": the task with them taken out, beside random heads taken out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks.needle import judge
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind, ablate
from interp.hooks.generate import Reply, generate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompt, Prompts

Judge = Callable[[str, Prompt], bool]
REPLY = 16
"""new tokens that a reply may take"""


@dataclass(frozen=True)
class Condition:
    """One way to run the task: which heads are out, and by what rule they were drawn."""

    name: str
    group: str
    """"as loaded", "top" or "steered", "random" or "random by layer" """
    heads: HeadSet


@dataclass(frozen=True)
class Outcome:
    """The verdict on each prompt under one condition."""

    condition: Condition
    verdicts: tuple[bool, ...]
    replies: tuple[str, ...] = field(repr=False)
    answers: tuple[str, ...] = field(default=(), repr=False)
    """what was expected, one a prompt"""
    questions: tuple[str, ...] = field(default=(), repr=False)
    """what was asked, one a prompt"""

    @property
    def accuracy(self) -> float:
        return sum(self.verdicts) / len(self.verdicts)

    def interval(self, level: float = 0.95, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Percentile bootstrap of the accuracy over prompts, seeded."""
        return bootstrap([self.verdicts], level, draws, seed)


@dataclass(frozen=True)
class CausalCheck:
    """Outcomes of all conditions on the same prompts."""

    outcomes: tuple[Outcome, ...]
    kind: str
    """the ablation, or the edit"""
    k: int
    seed: int = 0

    def group(self, name: str) -> tuple[float, float, float]:
        """Accuracy of a group and its 95% interval; over draws and prompts where there are several draws."""
        rows = [outcome.verdicts for outcome in self.outcomes if outcome.condition.group == name]
        if not rows:
            raise UsageError(f"group {name!r} is not in this check: it has {', '.join(self.groups)}.")
        mean = sum(map(sum, rows)) / sum(map(len, rows))
        return mean, *bootstrap(rows, seed=self.seed)

    def gain(self, name: str, over: str, level: float = 0.95, draws: int = 1000) -> tuple[float, float, float]:
        """Mean over prompts of one group's verdicts less another's, and its interval: each prompt with itself.

        Verdicts of several draws are averaged first; prompts are resampled, seeded. Cannot show: what other draws of
        heads would have given.
        """
        sides = []
        for group in (name, over):
            rows = [outcome.verdicts for outcome in self.outcomes if outcome.condition.group == group]
            if not rows:
                raise UsageError(f"group {group!r} is not in this check: it has {', '.join(self.groups)}.")
            sides.append(rows)
        return paired(*sides, level=level, draws=draws, seed=self.seed)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(outcome.condition.group for outcome in self.outcomes))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: heads as names."""
        rows = [
            {
                "name": outcome.condition.name,
                "group": outcome.condition.group,
                "heads": [str(head) for head in outcome.condition.heads],
                "verdicts": list(outcome.verdicts),
                "replies": list(outcome.replies),
                "answers": list(outcome.answers),
                "questions": list(outcome.questions),
                "accuracy": outcome.accuracy,
                "interval": outcome.interval(seed=self.seed),
            }
            for outcome in self.outcomes
        ]
        return {"kind": self.kind, "k": self.k, "seed": self.seed, "outcomes": rows}

    def __str__(self) -> str:
        lines = []
        for name in self.groups:
            mean, low, high = self.group(name)
            lines.append(f"{name:16s} {mean:5.0%}  [{low:.0%}, {high:.0%}]")
        return "\n".join(lines)


def bootstrap(
    rows: Sequence[Sequence[float | bool]], level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over rows (draws of heads) and columns (prompts), both resampled."""
    values = torch.tensor(rows, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    r, n = values.shape
    means = torch.stack(
        [
            values[torch.randint(r, (r,), generator=generator)][:, torch.randint(n, (n,), generator=generator)].mean()
            for _ in range(draws)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def paired(
    one: Sequence[Sequence[float | bool]],
    other: Sequence[Sequence[float | bool]],
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean over prompts of one side less the other, rows of a side averaged first, and its percentile interval."""
    first, second = (torch.tensor(rows, dtype=torch.float64).mean(0) for rows in (one, other))
    apart = first - second
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(apart), (draws, len(apart)), generator=generator)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(apart[chosen].mean(1), ends).tolist()
    return float(apart.mean()), low, high


def conditions(heads: HeadSet, layout: HeadLayout, draws: int = 3, seed: int = 0) -> tuple[Condition, ...]:
    """As loaded, the heads out, and `draws` times as many random heads of the rest, drawn freely and matched by layer.

    Retrieval heads sit in few layers: a free draw may only show depth, so the same number of heads per layer is drawn
    too.
    """
    if draws < 1:
        raise UsageError(f"draws={draws}: a control needs at least one draw of random heads.")
    if not len(heads):
        raise UsageError(
            "there are no heads to take out: the scores count no prompt (the model answered none), or the set is empty."
        )
    drawn = randoms(heads, layout, draws, seed)
    return (
        Condition("as loaded", "as loaded", HeadSet(())),
        Condition(f"top {len(heads)}", "top", heads),
        *(Condition(f"{group} {i % draws + 1}", group, found) for i, (group, found) in enumerate(drawn)),
    )


def randoms(heads: HeadSet, layout: HeadLayout, draws: int, seed: int) -> list[tuple[str, HeadSet]]:
    """`draws` times as many heads of the rest, drawn freely ("random"), then matched by layer ("random by layer")."""
    free = [("random", heads.random_like(layout, seed + i, "free")) for i in range(draws)]
    return free + [("random by layer", heads.random_like(layout, seed + i, "layer")) for i in range(draws)]


def ablation_test(
    model: nn.Module,
    prompts: Prompts,
    scores: HeadScores | HeadSet,
    *,
    k: int = 10,
    draws: int = 3,
    kind: AblationKind = "zero",
    reference: Prompts | None = None,
    judge: Judge = judge,
    max_new_tokens: int = REPLY,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> CausalCheck:
    """Accuracy on a task with the top k heads of `scores` (or a head set of your own) ablated, against random heads.

    `draws` times as many heads are drawn from the rest, freely and matched by layer.
    accuracy[condition] = mean over prompts of judge(reply, prompt), replies decoded greedily; prefill and decode are
    both ablated, by `kind` (see `ablate`). Use prompts that the scores were not made from. Intervals are over
    prompts, and over prompts and draws for the random groups. Heads without a score above 0 are never among
    the top. reference: for kind "mean" and "resample". Source: Wu et al. 2404.15574, section 3 (masking
    against random heads). Differs: random heads never include the top ones, a draw matched by layer is added, and
    masking is named. Cannot show: that other heads could not take over after training, nor what the heads compute.
    """
    from tqdm.auto import tqdm

    heads = scores.heads(top=k, above=0.0) if isinstance(scores, HeadScores) else scores
    rows = conditions(heads, HeadLayout.of(model), draws, seed)
    answers, questions = (tuple(str(prompt.meta.get(key, "")) for prompt in prompts) for key in ("answer", "question"))
    outcomes = []
    for condition in tqdm(rows, desc="causal check", disable=not progress, delay=2, leave=False):
        replies = ask(model, prompts, condition.heads, kind, max_new_tokens, batch_size, reference, seed)
        verdicts = tuple(judge(reply.text, prompt) for reply, prompt in zip(replies, prompts, strict=True))
        outcomes.append(Outcome(condition, verdicts, tuple(reply.text for reply in replies), answers, questions))
    return CausalCheck(tuple(outcomes), kind, len(heads), seed)


def ask(
    model: nn.Module,
    prompts: Prompts,
    heads: HeadSet,
    kind: AblationKind,
    max_new_tokens: int = REPLY,
    batch_size: int = 8,
    reference: Prompts | None = None,
    seed: int = 0,
) -> list[Reply]:
    """Greedy replies with the heads taken out, one a prompt."""
    replies: list[Reply] = []
    with ablate(model, heads, kind, reference=reference, seed=seed):
        for batch in prompts.batches(batch_size):
            replies += generate(model, batch, max_new_tokens=max_new_tokens, stop="\n")
    return replies
