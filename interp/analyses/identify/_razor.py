"""RazorAttention: prompts of many copies, attention on earlier copies, and the heads that keep a full cache."""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from interp.analyses.identify._targets import Targets, later_copies, score_targets, shift
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.transformerlens.without_rope import without_rope


def razor(
    model: nn.Module,
    prompts: Prompts,
    name: str,
    after: int,
    rope: bool,
    batch_size: int,
    seed: int,
    progress: bool,
) -> HeadScores:
    """Score each head by its mean attention on all earlier copies of a token, or `after` tokens behind them.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts that consist of copies.
        name: Name of the scores.
        after: Distance from the copied token to the key, 1 for induction and 0 for echo.
        rope: Read the attention of the model; False reads the softmax without the rotary embedding.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: Mean over pairs of a query and an earlier copy.
    """
    check_copies(prompts, name)

    def targets(prompt: Prompt) -> Targets:
        return copies(prompt, after)

    with nullcontext() if rope else without_rope(model):
        scores = score_targets(model, prompts, name, targets, batch_size=batch_size, seed=seed, progress=progress)
    # score_targets sums the targets of a query; here every pair of a query and a copy weighs the same
    share = [rows_per_pair(targets(prompt)) for prompt in prompts]
    return replace(
        scores,
        per_prompt=scores.per_prompt * torch.tensor(share)[:, None, None],
        settings={"rope": rope},
        extras={},
    )


def check_copies(prompts: Prompts, name: str = "razor") -> None:
    """Raise PromptError for a prompt whose spans do not mark copies that follow each other at one distance."""
    for number, prompt in enumerate(prompts):
        back, later = shift(prompt), later_copies(prompt)
        starts = [copy.start for copy in later]
        first = prompt.spans.get("first", ((0, 0),))[0][0]
        if back is None or back < 1 or starts != [first + back * (i + 1) for i in range(len(starts))]:
            raise PromptError(
                f"prompt {number} of '{name}' has no query with a target; mark copies of one text at one distance with "
                'the spans "first", "second", "copy3" ..., as tasks.repeated does.'
            )


def copies(prompt: Prompt, after: int) -> Targets:
    """For each position of a copy, the positions in all copies before it, moved on by `after` tokens."""
    back = shift(prompt) or 0
    found: Targets = [[] for _ in range(len(prompt))]
    for number, copy in enumerate(later_copies(prompt), start=1):
        for q in copy:
            found[q] = [q - d * back + after for d in range(1, number + 1)]
    return found


def rows_per_pair(targets: Targets) -> float:
    """Number of queries with a target, for each pair of a query and a target."""
    return sum(bool(keys) for keys in targets) / sum(map(len, targets))
