"""Entropy across contexts: how spread out a head's attention is where the answer begins, context by context."""

import torch
from torch import nn

from interp.analyses import costs
from interp.analyses.identify._last_token import at_last
from interp.analyses.identify._spread import spread
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.keep import entropy


@analysis(
    title="Context entropy",
    group="attention patterns",
    order=17,
    prompts=standard.contexts,
    joint=True,
    own_prompts=False,
    cost=costs.reading(entropy(), queries=1),
    shown_extras={"spread": "Std over contexts", "chosen": "Lowest on the right context"},
)
def context_entropy(
    model: nn.Module, prompts: Prompts, *, batch_size: int = 8, seed: int = 0, progress: bool = False
) -> HeadScores:
    """Score each head by the entropy of its attention at the last token, averaged over contexts of one question.

    `H[c l h] = -sum over k of pattern[c l h N k] ln pattern[c l h N k]`, where c is a context and N its prompt's last
    token. `score[n l h] = mean over the contexts c of question n of H`, in nats.

    H can be as large as ln(tokens), so give contexts of one length. Heads with high scores attend everywhere.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts such as `tasks.contexts`, or any whose meta "group" names the question that they belong to; a
            prompt without it is a question by itself.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, one row for each question, in nats. Extras: "contexts", H itself [n l
            h c], NaN where a question has fewer contexts; "spread", its population std over contexts; "chosen", 1 where
            the context of lowest entropy is the one with the answer, by chance 1 / contexts; NaN where no meta "gold"
            marks that context, or there is only one.

    Examples:
        >>> scores = interp.identify.context_entropy(model, prompts)
        >>> scores.extras["contexts"].shape
        torch.Size([2, 2, 4, 1])

    Source:
        Our own; there is no published score. It measures by head the entropy that Zhang et al. 2412.16545 find raised
        where contexts are encoded in parallel, and lower by attending to few of them.

    Differs:
        Each context is a prompt by itself, nothing is merged into one cache, and no layer or head is averaged away.

    Limits:
        Does not show that a head with low entropy attends to the right place; it may attend to the first token only.
    """
    values = at_last(model, prompts, entropy(), batch_size=batch_size, progress="context entropy" if progress else None)
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(str(prompt.meta.get("group", f"prompt {number}")), []).append(number)
    most = max(map(len, groups.values()))
    found = torch.full((len(groups), *values.shape[1:], most), torch.nan)
    chosen = torch.full(found.shape[:3], torch.nan)
    for row, own in enumerate(groups.values()):
        found[row, ..., : len(own)] = values[own].movedim(0, -1)
        gold = torch.tensor([bool(prompts[number].meta.get("gold", False)) for number in own])
        if gold.any() and len(own) > 1:
            chosen[row] = gold[values[own].argmin(0)].float()
    return HeadScores(
        name="context_entropy",
        per_prompt=found.nanmean(-1),
        unit="nats",
        kv_heads=HeadLayout.of(model).kv_heads,
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={"contexts": found, "spread": spread(found, -1), "chosen": chosen},
        seed=seed,
        labels=tuple(f"{group}, {len(own)} contexts" for group, own in groups.items()),
    )
