"""What the heads of a score do when they are out: the control beside tables that no task of their own checks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.causal.curve import Curve, causal_curve
from interp.analyses.identify._prompt_pairs import logit_difference, measured
from interp.analyses.measures.losses import token_losses
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs

OF_ANSWERS = ("activation_patching", "path_patching", "attribution_patching", "logit_attribution")
"""scores of heads that speak for the right answer: controlled by the logit difference"""
OF_LOOKING = ("induction", "previous_token", "duplicate_token", "sinks")
"""scores of where a head looks: controlled by the loss of some of their prompts, of a second copy if there is one"""
CONTROLLED = ("gradient_importance", *OF_ANSWERS, *OF_LOOKING)
TOKENS = 800
"""of the prompts of a control of OF_LOOKING, about"""


def control(name: str, model: nn.Module, prompts: Prompts, scores: HeadScores, **settings: Any) -> Curve:
    """A causal curve of a table's top heads, zeroed: logit difference for OF_ANSWERS, loss for all others.

    The prompts are among those that the scores were made from, so importance and patching are flattered by about their
    intervals; scores of where a head looks were not chosen by the loss.
    """
    k, size = settings.pop("k"), settings.pop("batch_size")
    measure: Callable[[nn.Module], Tensor]
    sizes, asked = taken(name, prompts, k, scores.layout)
    if name in OF_ANSWERS:
        known, measure = "logit difference", lambda model: differences(model, asked, size)
    else:
        repeats = name in OF_LOOKING and all("second" in prompt.spans for prompt in asked)
        known = "loss of the second copy, nats per token" if repeats else "loss, nats per token"
        measure = lambda model: token_losses(model, asked, size, loss=_second if repeats else None)  # noqa: E731
    return causal_curve(model, {name: scores}, {known: measure}, sizes=sizes, kind="zero", **settings)


def taken(name: str, prompts: Prompts, k: int, layout: HeadLayout) -> tuple[list[int], Prompts]:
    """How many heads a control takes out, and the prompts that it measures on."""
    if name not in OF_LOOKING:
        return sorted({max(1, k // 3), k}), prompts
    # a quarter of a small model is as much as can be matched by chance
    return [min(k, max(1, layout.size // 4))], _first(prompts)


def differences(model: Any, prompts: Prompts, batch_size: int = 8) -> Tensor:
    """Logit of the right answer less that of the wrong one after each prompt, as the model stands."""
    parts = []
    for batch in prompts.batches(batch_size):
        with torch.no_grad():
            logits = model(**model_inputs(model, batch), use_cache=False, logits_to_keep=1).logits
        parts.append(measured(logit_difference, logits, batch).cpu())
    return torch.cat(parts)


def _first(prompts: Prompts) -> Prompts:
    """The first prompts, until there are enough tokens; two at least, for an interval."""
    taken, tokens = 0, 0
    while taken < len(prompts) and (tokens < TOKENS or taken < 2):
        tokens += prompts.lengths[taken]
        taken += 1
    return prompts[:taken]


def _second(logits: Tensor, batch: Prompts) -> Tensor:
    """Loss of the tokens of each prompt's second copy; rows are padded on the left."""
    width, found = logits.shape[1], []
    for row, prompt in zip(logits, batch, strict=True):
        ids = torch.tensor(prompt.ids, device=logits.device)
        places = torch.tensor([q for start, stop in prompt.spans["second"] for q in range(start, stop)])
        before = row[places + width - len(ids) - 1].float()
        found.append(torch.nn.functional.cross_entropy(before, ids[places]))
    return torch.stack(found)
