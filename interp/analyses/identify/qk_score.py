"""Select-and-copy heads: heads whose query at the end of a multiple-choice question matches the right option's key."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from interp.analyses import costs
from interp.analyses.identify._gate import chooses_right
from interp.analyses.identify._last_token import last_rows
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import PromptError, SpanError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.keep import Rows, rows
from interp.hooks.transformerlens.without_rope import without_rope


def _kept(prompts: Prompts, settings: Mapping[str, Any]) -> tuple[Rows]:
    """Keeps of a batch, from which its cost follows."""
    return (rows(logits=not settings.get("attention", False)),)


def check_options(prompts: Prompts) -> None:
    """Raise for a prompt that is no multiple-choice question, or whose options end with different tokens."""
    prompts.span("options")
    for number, prompt in enumerate(prompts):
        right, options = prompt.meta.get("option"), len(prompt.spans["options"])
        if options < 2:
            raise SpanError(f'the span "options" of prompt {number} has one range; give a range for each option.')
        if not isinstance(right, int) or not 0 <= right < options:
            raise PromptError(
                f'meta "option" of prompt {number} is {right!r}; give the number, from 0, of the right one of its '
                f"{options} options."
            )
        ends = [prompt.ids[end] for end in _ends(prompt)]
        if len(set(ends)) > 1:
            tokenizer = prompts.tokenizer
            shown = ends if tokenizer is None else [tokenizer.decode([token]) for token in ends]
            raise PromptError(
                f"the options of prompt {number} end with different tokens ({', '.join(map(repr, shown))}), by which "
                "a head could distinguish them unread; end each with the same text, and let nothing "
                "follow the last one that the tokenizer joins to it, such as a second newline."
            )


def _ends(prompt: Prompt) -> list[int]:
    return [stop - 1 for _, stop in prompt.spans["options"]]


@analysis(
    title="QK-score",
    group="in-context tasks",
    order=15,
    prompts=standard.choice,
    own_prompts=False,
    check=check_options,
    cost=costs.gated(costs.reading(_kept, queries=1)),
    source_settings={"right_only": False, "n_pairs": "5 % of the questions, about 700 of MMLU"},
)
def qk_score(
    model: nn.Module,
    prompts: Prompts,
    *,
    attention: bool = False,
    right_only: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by how often it points at the right option: the option whose line end its query matches best.

    `fit[n l h d] = q[n l h N] . k[n l g t_d]` before the rotary embedding, where N is the last token of the prompt and
    t_d the token that ends the line of option d, the same one for all options. `score[n l h] = 1` where argmax over d
    of fit is the right option, else 0. Chance is 1 divided by the number of options.

    Prompts count where the model gives a right answer a higher logit than every wrong one, by their first tokens; the
    others are NaN. Where it answers none, no head has a score.

    q and k are read after norms, in a second run of each attention module without rotation (`unrotated`).

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts such as `tasks.get("choice").prompts(...)`, or any with a span "options", whose ranges end at
            the last token of each option's line, and meta "option", the number of the right one. Meta "right" and
            "wrong" hold the answers that the model may give.
        attention: Use `fit = pattern[n l h N t_d]` instead, with rotation.
        right_only: Count only the prompts that the model answers right; False counts all, as the paper does.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, 1 or 0; NaN where the prompt does not count, or the window of a layer
            hides an option from the last token. The extra "options" is fit, Float [n l h d]; without
            `attention` it includes the model's scale and its soft-cap.

    Raises:
        SpanError: If a prompt has no span "options", or only one range.
        PromptError: If meta "option" is not the number of an option, if the options of a prompt end with different
            tokens, or if answers are missing.
        ModelError: If the rotation of the model cannot be left out.

    Examples:
        >>> spans = {"options": ["A. red;", "B. blue;"]}
        >>> meta = {"option": 1, "right": [" B"], "wrong": [" A"]}
        >>> item = {"text": "A. red; B. blue; Answer:", "spans": spans, "meta": meta}
        >>> questions = interp.Prompts.encode(tokenizer, [item])
        >>> interp.identify.qk_score(model, questions).extras["options"].shape
        torch.Size([1, 2, 4, 2])

    Source:
        QK-score and attention score, Tulchinskii et al. 2410.02343.

    Differs:
        There are no added options such as "none of the above". The score is the accuracy on the prompts that the model
        answers right, where the paper takes all, chooses heads on 5 % and tests on the rest.

    Limits:
        Does not show that the model answers by this head. A model at chance answers some prompts right by luck, so
        compare the number of prompts that count with the number of options. A small model may point at the right option
        and answer wrong, which `right_only=False` shows.
    """
    check_options(prompts)
    counts = chooses_right(model, prompts, batch_size) if right_only else torch.ones(len(prompts), dtype=torch.bool)
    keep = rows(logits=not attention)
    most = max(len(prompt.spans["options"]) for prompt in prompts)
    fits, parts = [], []
    with nullcontext() if attention else without_rope(model):
        title = "qk_score" if progress else None
        for batch, last, seen in last_rows(model, prompts, keep, keys=_ends, batch_size=batch_size, progress=title):
            for b, prompt in enumerate(batch):
                ends = _ends(prompt)
                fit = last[b, :, :, ends]
                right = (fit.argmax(-1) == prompt.meta["option"]).float()
                parts.append(right.masked_fill(~seen[b, ..., : len(ends)].all(-1), torch.nan))
                fits.append(nn.functional.pad(fit, (0, most - len(ends)), value=torch.nan))
    return HeadScores(
        name="qk_score_attention" if attention else "qk_score",
        per_prompt=torch.stack(parts).masked_fill(~counts[:, None, None], torch.nan),
        unit="accuracy",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"attention": attention, "right_only": right_only},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={"options": torch.stack(fits)},
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", "")) for prompt in prompts),
    )
