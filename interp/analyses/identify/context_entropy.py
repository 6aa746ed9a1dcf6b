"""Entropy across contexts: how spread out a head's attention is where the answer begins, context by context."""

import torch
from torch import nn

from interp.analyses.identify._last_token import at_last
from interp.analyses.identify._spread import spread
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.keep import entropy


def context_entropy(
    model: nn.Module, prompts: Prompts, *, batch_size: int = 8, seed: int = 0, progress: bool = False
) -> HeadScores:
    """Entropy of attention at the position that answers, on average over several contexts of one question, in nats.

    H[c l h] = -sum over k of pattern[c l h N k] ln pattern[c l h N k], c a context and N its prompt's last token;
    score[n l h] = mean over the contexts c of question n of H. extras: "contexts", H itself [n l h c] (NaN where a
    question has fewer); "spread", its population std over contexts; "chosen", 1 where the context of lowest entropy is
    the one with the answer, by chance 1 / contexts (NaN where no meta "gold" says so, or with a single context).
    prompts: tasks.contexts, or any whose meta "group" says which question they belong to; without one each is its own.
    H can be as large as ln(tokens): give contexts of one length. High scores are heads that look everywhere.
    Source: ours, no published score. It measures by head what Zhang et al. 2412.16545 find raised where contexts are
    encoded in parallel, and lower by attending to few of them. Differs: each context is a prompt of its own, nothing is
    merged into one cache, and no layer or head is averaged away.
    Cannot show: that a head with low entropy looks at the right place; it may rest on the first token.
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
