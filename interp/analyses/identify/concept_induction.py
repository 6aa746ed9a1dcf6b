"""Concept induction: heads that attend to the end of a word of several tokens in order to write it again."""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from interp.analyses import costs
from interp.analyses.identify._gate import predicts
from interp.analyses.identify._targets import Targets, score_targets
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import PromptError, SpanError, UsageError
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read import keep as keeps

SCORE_NAMES = {"last": "concept_induction", "next": "token_induction"}


@analysis(
    title="Concept induction",
    group="copying",
    order=16,
    prompts=standard.entities,
    paired=True,
    own_prompts=False,
    cost=costs.gated(costs.reading(keeps.at(-1))),
    source_settings={"target": "last", "by_value": True, "right_only": False, "n_pairs": 2048},
    control_extras={"control": "On random tokens"},
)
def concept_induction(
    model: nn.Module,
    prompts: Prompts,
    control: Prompts | None = None,
    *,
    target: Literal["last", "next"] = "last",
    by_value: bool = True,
    right_only: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its attention on the last token of a word, from where the word would be written a second time.

    With N the last token of the prompt and e the key, `score[n l h] = p[n l h N e] |v_e| / sum over k of p[n l h N k]
    |v_k|`, where p is the pattern and v are the values.

    Prompts count where the model goes on with the word: its most probable next token is the first one of the span. The
    others are NaN. Where it goes on with no word, no head has a score.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with a span "entity", such as `tasks.entities`.
        control: As many prompts with random tokens in place of the word, such as `tasks.entities(random=True)`. A head
            that copies words attends to the end of a word much more than to that of random tokens. A control counts
            where its prompt does.
        target: "last" takes the last token of the span as e, which finds heads that copy meanings. "next" takes its
            first token, which finds heads that copy token by token; the table is then called token_induction, and
            prompts of random tokens suit it best.
        by_value: Weight each key by the norm of its value vector, as in the formula; False takes p alone.
        right_only: Count only the prompts that the model continues with the word; False counts all, as the paper does.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in shares of attention; NaN where the prompt does not count, or the
            window of a layer hides e. With `control`, the extra "control" is the same number on the control prompts.

    Raises:
        SpanError: If the entity is not in one place before the last token.
        PromptError: If prompts and controls differ in number.
        UsageError: If the target is unknown.

    Examples:
        >>> item = {"text": "The elephant ate. The", "spans": {"entity": "elephant"}}
        >>> words = interp.Prompts.encode(tokenizer, [item])
        >>> interp.identify.concept_induction(model, words).per_prompt.shape
        torch.Size([1, 2, 4])

    Source:
        Feucht et al. 2504.03022, attention scores.

    Differs:
        Uses its own words and texts, cut before the word, and counts only those that the model goes on to write.

    Limits:
        Does not show that the head copies the word; the causal score of the paper patches its output.
    """
    if target not in SCORE_NAMES:
        raise UsageError(
            f"unknown target {target!r}; choose from 'last' (the end of the word), 'next' (its first token)."
        )
    if control is not None and len(control) != len(prompts):
        raise PromptError(
            f"{len(control)} controls and {len(prompts)} prompts do not match; give one control for each prompt."
        )
    measured = partial(
        score_targets,
        model,
        name=SCORE_NAMES[target],
        targets=partial(_at_entity, last=target == "last"),
        by_value=by_value,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    for side in (prompts, control):
        if side is not None:
            _check(side)
    scores = measured(prompts)
    counts = torch.ones(len(prompts), dtype=torch.bool)
    if right_only:
        words = [prompt.ids[prompt.spans["entity"][0][0]] for prompt in prompts]
        counts = predicts(model, prompts, words, batch_size)
    extras = {} if control is None else {"control": measured(control).per_prompt}
    others = ~counts[:, None, None]
    return replace(
        scores,
        per_prompt=scores.per_prompt.masked_fill(others, torch.nan),
        extras={name: extra.masked_fill(others, torch.nan) for name, extra in extras.items()},
        settings={"target": target, "by_value": by_value, "right_only": right_only},
        labels=tuple(str(prompt.meta.get("entity", "")) for prompt in prompts),
    )


def _at_entity(prompt: Prompt, last: bool) -> Targets:
    start, stop = prompt.spans["entity"][0]
    return [*([] for _ in range(len(prompt) - 1)), [stop - 1 if last else start]]


def _check(prompts: Prompts) -> None:
    for number, (prompt, spans) in enumerate(zip(prompts, prompts.span("entity"), strict=True)):
        if len(spans) != 1 or spans[0][1] >= len(prompt):
            raise SpanError(
                f'prompt {number} has its "entity" in {len(spans)} places up to token {spans[-1][1]} of {len(prompt)}; '
                "mark one place, before the last token."
            )
