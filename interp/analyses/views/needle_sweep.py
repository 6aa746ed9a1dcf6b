"""Needles by length and depth: where in a context of which length a model still finds a fact."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from interp.analyses import costs
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.registry import analysis
from interp.analyses.results.codec import result
from interp.analyses.results.files import plain
from interp.analyses.results.result import Result
from interp.analyses.tasks import standard
from interp.analyses.tasks.needle import judge, rouge1_recall
from interp.analyses.tasks.task import Judge
from interp.errors import PromptError, UsageError
from interp.hooks.generate import generate
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

__all__ = ["NeedleSweep", "needle_sweep"]


@result
@dataclass(frozen=True)
class NeedleSweep(Result):
    """Replies to needle prompts, with the length and the depth of each prompt."""

    lengths: tuple[int, ...]
    """length of each prompt in tokens, as given to `tasks.needle`"""
    depths: tuple[float, ...]
    """place of the needle in each prompt, as a fraction of the text"""
    right: tuple[float, ...]
    """verdict of the judge on each reply, 0 or 1"""
    recall: tuple[float, ...] = field(repr=False)
    """ROUGE-1 recall of each answer in the reply"""
    at_limit: tuple[float, ...] = field(repr=False)
    """1 where a reply ended at the limit of new tokens"""
    replies: tuple[str, ...] = field(repr=False)
    """text that the model generated after each prompt"""
    questions: tuple[str, ...] = field(default=(), repr=False)
    """question of each prompt"""
    answers: tuple[str, ...] = field(default=(), repr=False)
    """right answer of each prompt"""
    name: str = "needle_sweep"
    """name of the analysis"""
    settings: dict[str, Any] = field(default_factory=dict)
    """settings, as JSON returns them"""
    provenance: Provenance | None = None
    """the model, tokenizer and versions that the replies come from"""

    def __post_init__(self) -> None:
        n = len(self.lengths)
        if not n or any(len(row) != n for row in (self.depths, self.right, self.recall, self.at_limit, self.replies)):
            raise UsageError("a needle sweep has no prompts, or rows of different lengths; give one entry for each.")
        object.__setattr__(self, "settings", plain(self.settings, "settings of the needle sweep"))

    def cell(self, length: int | None = None, depth: float | None = None) -> tuple[float, ...]:
        """Verdicts on the prompts of a length and a depth.

        Args:
            length: One of `lengths`; None for all.
            depth: One of `depths`; None for all.

        Returns:
            The verdicts, 0 or 1.
        """
        rows = zip(self.lengths, self.depths, self.right, strict=True)
        return tuple(r for n, d, r in rows if length in (None, n) and depth in (None, d))

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row per prompt: length, depth, right, recall, at_limit, reply."""
        import pandas as pd

        names = ("length", "depth", "right", "recall", "at_limit", "reply")
        rows = (self.lengths, self.depths, self.right, self.recall, self.at_limit, self.replies)
        return pd.DataFrame(dict(zip(names, rows, strict=True)))

    def summary(self, top: int = 10) -> str:
        """One line for each length: right replies with their 95 % interval (Wilson), and those at each depth."""
        from scipy.stats import binomtest

        lines = []
        for length in sorted(set(self.lengths)):
            right = self.cell(length)
            ends = binomtest(int(sum(right)), len(right)).proportion_ci(method="wilson")
            depths = sorted({d for n, d in zip(self.lengths, self.depths, strict=True) if n == length})
            cells = [self.cell(length, depth) for depth in depths]
            each = ", ".join(f"{d:g}: {sum(c):.0f} of {len(c)}" for d, c in zip(depths, cells, strict=True))
            share = f"{sum(right) / len(right):.0%} [{ends.low:.0%}, {ends.high:.0%}]"
            lines.append(f"{length:7,d} tokens  {share}  by depth {each}")
        ended, wrong = sum(self.at_limit), sum(a * (1 - r) for a, r in zip(self.at_limit, self.right, strict=True))
        lines.append(
            f"{ended:.0f} of {len(self.right)} replies ended at the limit of {self.settings.get('max_new_tokens')} new "
            f"tokens; {wrong:.0f} of them are wrong."
        )
        return "\n".join(lines)

    @classmethod
    def concat(cls, parts: Sequence["NeedleSweep"]) -> "NeedleSweep":
        """The prompts of all parts in one result.

        Args:
            parts: Results of one model with the same settings.

        Returns:
            NeedleSweep: the joined result.

        Raises:
            UsageError: If there are no parts, or they differ in their settings.
        """
        if not parts or any(part.settings != parts[0].settings for part in parts):
            raise UsageError("there are no needle sweeps to join, or their settings differ; give parts of one sweep.")
        names = ("lengths", "depths", "right", "recall", "at_limit", "replies", "questions", "answers")
        joined: dict[str, Any] = {name: tuple(x for part in parts for x in getattr(part, name)) for name in names}
        return replace(parts[0], **joined)


def _measured(prompts: Prompts) -> None:
    for number, prompt in enumerate(prompts):
        if missing := [key for key in ("length", "depth", "answer") if key not in prompt.meta]:
            raise PromptError(
                f'prompt {number} has no "{missing[0]}" in its meta; give prompts of tasks.needle, or add it.'
            )


@analysis(
    title="Needles by length and depth",
    group="long context",
    order=14,
    prompts=standard.needle_grid,
    check=_measured,
    in_all=False,
    max_new_tokens="reply_tokens",
    run_settings={"max_new_tokens": "$reply_tokens"},
    cost=costs.decoding(max_new_tokens=REPLY_TOKENS),
    source_settings={
        "max_new_tokens": 50,
        "sweep_lengths": "20 from 1,000 to 50,000",
        "needle_depths": "10 from 0 to 1",
    },
)
def needle_sweep(
    model: nn.Module,
    prompts: Prompts,
    *,
    judge: Judge = judge,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
    progress: bool = False,
) -> NeedleSweep:
    """Measure how often a model answers needle prompts, by the length of the prompt and the depth of the needle.

    `right[p] = judge(reply of prompt p, prompt p)`, for greedy replies up to a newline. Its mean over the prompts of a
    length and depth is what the figure shows. In a run, lengths double from 256 tokens up to the context of the model;
    `--sweep-lengths` gives others.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Needle prompts of several lengths and depths, such as `tasks.needle`.
        judge: Function of a reply and its prompt that returns whether the reply is right.
        max_new_tokens: Number of new tokens of a reply, at most.
        batch_size: Number of prompts per forward pass.
        progress: Show a progress bar.

    Returns:
        NeedleSweep: Verdict, recall and reply of each prompt, with its length and depth.

    Raises:
        PromptError: If a prompt does not state its length, depth and answer, or does not fit into the context.

    Examples:
        >>> from interp.analyses.views.needle_sweep import needle_sweep
        >>> needles = interp.tasks.needle(tokenizer, lengths=(560, 700), depths=(0.2, 0.8))
        >>> found = needle_sweep(model, needles, max_new_tokens=2)
        >>> found.depths
        (0.2, 0.8, 0.2, 0.8)

    Source:
        The test of Kamradt (LLMTest_NeedleInAHaystack, 2023), as Wu et al. 2404.15574 use it.

    Differs:
        A reply is right or wrong by its words, where the test lets a model grade it. Texts, facts and distractors are
        those of `tasks.needle`.

    Limits:
        Does not show understanding of long texts; a needle asks for one sentence. Few prompts of a cell show little, so
        compare whole lengths.
    """
    from tqdm.auto import tqdm

    _measured(prompts)
    replies = []
    with tqdm(total=len(prompts), desc="needle sweep", disable=not progress, delay=2, leave=False) as bar:
        for batch in prompts.batches(batch_size):
            replies += generate(model, batch, max_new_tokens=max_new_tokens, stop="\n")
            bar.update(len(batch))
    pairs = list(zip(replies, prompts, strict=True))
    return NeedleSweep(
        lengths=tuple(int(prompt.meta["length"]) for prompt in prompts),
        depths=tuple(float(prompt.meta["depth"]) for prompt in prompts),
        right=tuple(float(judge(reply.text, prompt)) for reply, prompt in pairs),
        recall=tuple(rouge1_recall(prompt.meta["answer"], reply.text) for reply, prompt in pairs),
        at_limit=tuple(float(reply.at_limit) for reply in replies),
        replies=tuple(reply.text for reply in replies),
        questions=tuple(str(prompt.meta.get("question", "")) for prompt in prompts),
        answers=tuple(str(prompt.meta["answer"]) for prompt in prompts),
        settings={"max_new_tokens": max_new_tokens, "haystack": str(prompts[0].meta.get("haystack", ""))},
        provenance=Provenance.of(model, prompts.tokenizer),
    )
