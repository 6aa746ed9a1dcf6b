"""Select-and-copy heads: heads whose query at the end of a multiple-choice question fits the right option's key."""

import math
from contextlib import nullcontext

import torch
from torch import nn

from interp.analyses.identify._last_token import last_rows
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, SpanError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.keep import rows
from interp.hooks.transformerlens.without_rope import without_rope


def qk_score(
    model: nn.Module,
    prompts: Prompts,
    *,
    attention: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """How often a head points at the right option: the accuracy of taking the option whose line end its query fits.

    fit[n l h d] = q[n l h N] . k[n l g t_d] before the rotary embedding, N the last token of the prompt, t_d the token
    that ends the line of option d; score[n l h] = 1 where argmax over d of fit is the right option, else 0. A head that
    sees no option scores 0. attention=True: fit = pattern[n l h N t_d], with rotation. extras["options"]: fit, Float
    [n l h d], times the model's scale and under its soft-cap without attention. Chance is 1 over the options.
    q and k are read after norms, in a second run of each attention module with a rotation by nothing (`without_rope`).
    prompts: tasks.get("choice").prompts(...), or any with a span "options", a range for each option whose last token
    ends its line, and meta "option", the number of the right one.
    Raises SpanError, PromptError for prompts without them, ModelError for a model whose rotation cannot be left out.
    Source: QK-score and attention score, Tulchinskii et al. 2410.02343. Differs: no added options such as "none of the
    above"; a head's accuracy on all prompts given, where the paper chooses heads on 5 % and tests on the rest.
    Cannot show: that the model answers by this head; a small model may point right and answer wrong.
    """
    prompts.span("options")
    for number, prompt in enumerate(prompts):
        right, options = prompt.meta.get("option"), len(prompt.spans["options"])
        if options < 2:
            raise SpanError(f'the span "options" of prompt {number} has one range: give a range for each option.')
        if not isinstance(right, int) or not 0 <= right < options:
            raise PromptError(
                f'meta "option" of prompt {number} is {right!r}: give the number, from 0, of the right one of its '
                f"{options} options."
            )
    keep = rows(logits=not attention)
    most = max(len(prompt.spans["options"]) for prompt in prompts)
    fits, parts = [], []
    with nullcontext() if attention else without_rope(model):
        title = "qk_score" if progress else None
        for batch, last in last_rows(model, prompts, keep, batch_size=batch_size, progress=title):
            for b, prompt in enumerate(batch):
                ends = [stop - 1 for _, stop in prompt.spans["options"]]
                fit = last[b, :, :, ends]
                best, chosen = fit.max(-1)
                # a window that no longer reaches the options leaves nothing to choose by
                seen = best > (0.0 if attention else -math.inf)
                parts.append((seen & (chosen == prompt.meta["option"])).float())
                fits.append(nn.functional.pad(fit, (0, most - len(ends)), value=torch.nan))
    return HeadScores(
        name="qk_score_attention" if attention else "qk_score",
        per_prompt=torch.stack(parts),
        unit="accuracy",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"attention": attention},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={"options": torch.stack(fits)},
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", "")) for prompt in prompts),
    )
