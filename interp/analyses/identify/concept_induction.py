"""Concept induction: heads that look at the end of a word of several tokens in order to write it again."""

from dataclasses import replace
from functools import partial
from typing import Literal

from torch import nn

from interp.analyses.identify._targets import Targets, score_targets
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, SpanError, UsageError
from interp.hooks.prompts.prompts import Prompt, Prompts

NAMES = {"last": "concept_induction", "next": "token_induction"}


def concept_induction(
    model: nn.Module,
    prompts: Prompts,
    control: Prompts | None = None,
    *,
    target: Literal["last", "next"] = "last",
    by_value: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Attention on the last token of a word of several tokens, from where the word would be written a second time.

    With N the last token of the prompt and e the key, score[n l h] = p[n l h N e] |v_e| / sum over k of p[n l h N k]
    |v_k|, p the pattern and v the values. target "last": e is the last token of the span "entity", which heads find
    that copy meanings; "next": its first token, which heads find that copy token by token (the table is then called
    token_induction, and its prompts are best those of random tokens). by_value=False takes p alone.
    prompts: tasks.entities. control: as many prompts, as of tasks.entities(random=True): extras["control"] is the same
    number there. A head of words looks at the end of a word much more than at that of random tokens.
    Raises SpanError where the entity is not in one place before the last token, PromptError for another number of
    controls, UsageError for another target.
    Source: Feucht et al. 2504.03022, attention scores. Differs: own words and texts, cut before the word.
    Cannot show: that the head copies the word: their causal score patches its output.
    """
    if target not in NAMES:
        raise UsageError(f"target={target!r}: take 'last' (the end of the word) or 'next' (its first token).")
    if control is not None and len(control) != len(prompts):
        raise PromptError(f"{len(control)} controls of {len(prompts)} prompts: give one for each.")
    measured = partial(
        score_targets,
        model,
        name=NAMES[target],
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
    extras = {} if control is None else {"control": measured(control).per_prompt}
    return replace(
        scores,
        extras=extras,
        settings={"target": target, "by_value": by_value},
        labels=tuple(str(prompt.meta.get("entity", "")) for prompt in prompts),
    )


def _at_entity(prompt: Prompt, last: bool) -> Targets:
    start, stop = prompt.spans["entity"][0]
    return [*([] for _ in range(len(prompt) - 1)), [stop - 1 if last else start]]


def _check(prompts: Prompts) -> None:
    for number, (prompt, spans) in enumerate(zip(prompts, prompts.span("entity"), strict=True)):
        if len(spans) != 1 or spans[0][1] >= len(prompt):
            raise SpanError(
                f'prompt {number} has its "entity" in {len(spans)} places up to token {spans[-1][1]} of {len(prompt)}: '
                "name one place, before the last token."
            )
