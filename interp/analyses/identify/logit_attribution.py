"""Direct logit attribution: what each head adds to the answer by the weights alone."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses import costs
from interp.analyses.causal import controls
from interp.analyses.identify._prompt_pairs import table
from interp.analyses.measures.answer_logits import answer_tokens
from interp.analyses.measures.head_outputs import HeadOutputs, bridged, by_length
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context


@analysis(
    title="Logit attribution",
    group="patching",
    order=25,
    prompts=standard.ioi_clean,
    check=answer_tokens,
    control=controls.logit_difference(),
    cost=costs.writing(),
)
def logit_attribution(
    model: nn.Module,
    prompts: Prompts,
    answers: Sequence[tuple[int, int]] | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by what it writes toward the right answer and away from the wrong one.

    `score[n l h] = (z[n h d] W_O[h d m]) / s[n] . (gamma[m] (W_U[m right] - W_U[m wrong]))` at the last position, where
    s is the scale of the final norm in this run. LayerNorm centres what the head wrote, RMSNorm does not.

    Only prompts count on which the model shows the behaviour, that is where the logit of the right answer is above that
    of the wrong one. The scores of others are NaN, and without such a prompt no head has a score.

    Heads, MLPs and embeddings, together with the biases that belong to no head (of W_O, the final norm and the
    unembedding), sum to the difference of the two logits, before the soft-cap or scale that a model applies to its
    logits. A norm after attention (Gemma 2 and 3, OLMo 2) is applied to each head with its scale in this run.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with answers, such as the first side of `tasks.ioi`.
        answers: Token ids (right, wrong) for each prompt; None takes the first tokens of meta["right"] and
            meta["wrong"].
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in logits, NaN for a prompt that does not count.

    Raises:
        PromptError: If a prompt has no answers, or both begin with the same token.
        UsageError: If `answers` are not pairs of token ids of this model.
        ModelError: If no bridge can be made, or heads do not add up to what their attention writes.

    Examples:
        >>> scores = interp.identify.logit_attribution(model, prompts, answers=[(5, 7), (5, 7)])
        >>> scores.per_prompt.shape
        torch.Size([2, 2, 4])

    Source:
        Wang et al. 2211.00593; TransformerLens' stack_head_results and apply_ln_to_stack.

    Differs:
        Weights need not be folded, since gamma is multiplied in. Prompts on which the model is wrong are left out.

    Limits:
        Does not show what a head does through later layers, nor what they would do without it.
    """
    check_context(model, prompts)
    pairs = answer_tokens(prompts) if answers is None else _given(answers, prompts)
    layout = HeadLayout.of(model)
    found = torch.empty(len(prompts), layout.layers, layout.heads)
    bar = tqdm(total=len(prompts), desc="logit attribution", disable=not progress, delay=2, leave=False)
    with bar, bridged(model) as tl, torch.no_grad():
        low, high, known = int(pairs.min()), int(pairs.max()), tl.W_U.shape[1]
        if low < 0 or high >= known:
            raise UsageError(f"answers hold ids from {low} to {high}; those of this model run from 0 to {known - 1}.")
        for index, (batch,) in by_length(prompts, batch_size=batch_size):
            found[index] = _direct(tl, batch, pairs[index].to(tl.W_U.device), layout).cpu()
            bar.update(len(index))
    return table("logit_attribution", model, prompts, found, "logits", seed)


def _given(answers: Sequence[tuple[int, int]], prompts: Prompts) -> Int[Tensor, "b 2"]:
    rows = torch.as_tensor(answers)
    if rows.shape != (len(prompts), 2) or rows.is_floating_point():
        raise UsageError(
            f"answers have shape {list(rows.shape)}; give token ids (right, wrong) for each of {len(prompts)} prompts."
        )
    return rows.long()


def _direct(tl: Any, prompts: Prompts, answers: Int[Tensor, "b 2"], layout: HeadLayout) -> Float[Tensor, "b l h"]:
    run = HeadOutputs.of(tl, prompts, layout)
    run.check_readout(answers)
    right, wrong = tl.W_U[:, answers].float().unbind(2)
    toward = torch.einsum("cbm,mb->bc", run.read(run.heads.flatten(0, 1)), right - wrong)
    # what leads to a wrong answer says nothing about the heads of a behaviour
    right_first = run.logits.gather(1, answers).diff(dim=1) < 0
    return torch.where(right_first, toward, torch.nan).unflatten(1, (layout.layers, layout.heads))
