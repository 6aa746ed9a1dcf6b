"""RazorAttention's heads: over many copies of one text, heads that look at all earlier copies of a token or behind."""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from interp.analyses.identify._targets import Targets, later_copies, score_targets, shift
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, ScoreError, UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.transformerlens.without_rope import without_rope


def razor_induction(
    model: nn.Module,
    prompts: Prompts,
    *,
    rope: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Attention on the tokens after all earlier copies of the current token, mean over rows and copies.

    score[n l h] = mean over pairs (q, d) of pattern[n l h q q-dK+1], q in copy c = 2, 3, ... of K tokens, d = 1..c-1.
    The pairs are averaged, not summed in a row: with four copies a perfect head scores 0.5, with two copies 1.
    prompts: tasks.repeated(copies=4). rope=False reads the softmax without the rotary embedding (`without_rope`).
    Raises PromptError for prompts without copies.
    Source: RazorAttention, Tang et al. 2407.15891, induction heads. Differs: K as given, 2500 in the paper; the tool of
    its vendor computes what rope=False does, from projections before any norm of q and k, here after it.
    Cannot show: that the head carries anything over distance in text that does not repeat.
    """
    return _razor(model, prompts, "razor_induction", 1, rope, batch_size, seed, progress)


def razor_echo(
    model: nn.Module,
    prompts: Prompts,
    *,
    rope: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Attention on all earlier copies of the current token itself, mean over rows and copies.

    score[n l h] = mean over pairs (q, d) of pattern[n l h q q-dK], q in copy c = 2, 3, ... of K tokens, d = 1..c-1.
    With four copies a perfect head scores 0.5, with two copies 1. Prompts, rope and errors as in razor_induction.
    Source: RazorAttention, Tang et al. 2407.15891, echo heads. Differs: as razor_induction.
    Cannot show: that the head reads identity rather than distance; all copies lie K tokens apart.
    """
    return _razor(model, prompts, "razor_echo", 0, rope, batch_size, seed, progress)


def razor_protected(
    induction: HeadScores,
    echo: HeadScores,
    layout: HeadLayout | None = None,
    *,
    share: tuple[float, float] = (0.14, 0.01),
) -> HeadSet:
    """The heads whose whole cache RazorAttention keeps: the first by induction, and the first by echo.

    group[l g] = max over the query heads h of kv head g of score[l h]. Of all n kv heads of the model round(share * n)
    are taken from each ranking, at least one, ties to the earlier; all query heads of these are returned.
    share: of induction and of echo heads. layout: where the scores do not know the kv heads, as from old files.
    Raises ScoreError for tables of two shapes, UsageError for shares outside of [0, 1].
    Source: RazorAttention, Tang et al. 2407.15891: 14 % and 1 %. Differs: the vendor's tool compares values by
    membership, so that ties take more than the share, and its 1 % of few heads rounds to none.
    Cannot show: that the others can be cut; that is for evaluation with a cut cache.
    """
    layout = layout or induction.layout
    for scores in (induction, echo):
        if (scores.layers, scores.n_heads) != (layout.layers, layout.heads):
            raise ScoreError(
                f"'{scores.name}' has {scores.layers}x{scores.n_heads} heads and the layout "
                f"{layout.layers}x{layout.heads}: give both scores of one model."
            )
    if not all(0 <= part <= 1 for part in share):
        raise UsageError(f"share={share}: give the shares of induction and echo heads, each between 0 and 1.")
    groups = HeadSet()
    for scores, part in zip((induction, echo), share, strict=True):
        best = scores.by_group(layout.kv_heads).flatten()
        count = max(1, round(part * len(best)))
        first = best.sort(descending=True, stable=True).indices[:count].tolist()
        groups |= HeadSet(tuple(Head(*divmod(i, layout.kv_heads)) for i in first))
    each = layout.heads // layout.kv_heads
    return HeadSet(tuple(Head(layer, group * each + i) for layer, group in groups for i in range(each)))


def _razor(
    model: nn.Module,
    prompts: Prompts,
    name: str,
    after: int,
    rope: bool,
    batch_size: int,
    seed: int,
    progress: bool,
) -> HeadScores:
    check_copies(prompts, name)

    def targets(prompt: Prompt) -> Targets:
        return copies(prompt, after)

    with nullcontext() if rope else without_rope(model):
        scores = score_targets(model, prompts, name, targets, batch_size=batch_size, seed=seed, progress=progress)
    # score_targets sums the targets of a row; here every pair of a row and a copy weighs the same
    share = [_rows(targets(prompt)) for prompt in prompts]
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
                f"prompt {number} of '{name}' has no query with a target: mark copies of one text at one distance by "
                'the spans "first", "second", "copy3" ..., as tasks.repeated does.'
            )


def copies(prompt: Prompt, after: int) -> Targets:
    """For each position of a copy the places in all copies before it, moved `after` tokens on."""
    back = shift(prompt) or 0
    found: Targets = [[] for _ in range(len(prompt))]
    for number, copy in enumerate(later_copies(prompt), start=1):
        for q in copy:
            found[q] = [q - d * back + after for d in range(1, number + 1)]
    return found


def _rows(targets: Targets) -> float:
    """Rows with a target for each pair of a row and a target."""
    return sum(bool(keys) for keys in targets) / sum(map(len, targets))
