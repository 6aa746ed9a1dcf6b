"""Detectors on token positions: the keys that each query should attend to, and the mean attention on them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import At, at
from interp.hooks.read.visibility import Visibility, keys_by_query
from interp.hooks.seam import tapping

Targets = list[list[int]]
"""for each query position, the key positions that count; an empty list where the query does not count"""


def shift(prompt: Prompt) -> int | None:
    """Distance between the first two copies, for prompts with the spans "first" and "second"; else None."""
    if "first" in prompt.spans and "second" in prompt.spans:
        return prompt.spans["second"][0][0] - prompt.spans["first"][0][0]
    return None


def later_copies(prompt: Prompt) -> list[range]:
    """Positions of each copy after the first; `tasks.repeated` names further ones copy3, copy4, ..."""
    return [range(*prompt.spans[name][0]) for name in prompt.spans if name == "second" or name.startswith("copy")]


def earlier(prompt: Prompt) -> Targets:
    """For each position, the earlier positions that hold the same token.

    Where the spans "first" and "second" mark two copies, the earlier position is the one in the copy before. A control
    whose second half is not a copy is therefore measured at the same positions.
    """
    back = shift(prompt)
    if back is not None:
        later = later_copies(prompt)
        return [[i - back] if any(i in copy for copy in later) else [] for i in range(len(prompt))]
    seen: dict[int, list[int]] = {}
    found: Targets = []
    for i, token in enumerate(prompt.ids):
        found.append(list(seen.get(token, [])))
        seen.setdefault(token, []).append(i)
    return found


def after_earlier(prompt: Prompt) -> Targets:
    """For each position, the token after the latest earlier occurrence of the same token."""
    # the token right before would be its own target when a token comes twice in a row
    return [[keys[-1] + 1] if keys and keys[-1] + 1 < q else [] for q, keys in enumerate(earlier(prompt))]


def check_targets(prompts: Prompts, name: str, targets: Callable[[Prompt], Targets]) -> None:
    """Raise PromptError for a prompt in which no query has a target."""
    for number, prompt in enumerate(prompts):
        if not any(targets(prompt)):
            raise PromptError(
                f"prompt {number} for '{name}' has no query with a target, since no token occurs twice; "
                "use tasks.repeated or longer text."
            )


def score_targets(
    model: nn.Module,
    prompts: Prompts,
    name: str,
    targets: Callable[[Prompt], Targets],
    *,
    by_value: bool = False,
    both: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its attention on the targets of each query, averaged over the queries that have a target.

    `score[n l h] = mean over q with targets of sum over k in targets[q] of pattern[n l h q k]`. The extra "mul" [n l h]
    divides the same sum by the number of all queries, which is TransformerLens' "mul" measure. With `both`,
    the extra "by_value" [n l h] is the score with each key weighted by the norm of its value vector.

    A target outside of the window of a layer gives 0, and a prompt is NaN for a head that can see none of its targets.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with at least one target each.
        name: Name of the scores.
        targets: Function of a prompt that gives the targets of each query.
        by_value: Weight each key by the norm of its value vector.
        both: Measure the weighted score as well where `by_value` is not set.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in shares of attention.

    Raises:
        PromptError: If no query of a prompt has a target.
    """
    kinds = (by_value, True) if both and not by_value else (by_value,)
    values, weighted, whole = [], [], []
    made: list[tuple[list[At], Tensor]] = []
    sight = Visibility()

    def keep(batch: Prompts) -> list[At]:
        check_targets(batch, name, targets)
        keys, rows = table([targets(prompt) for prompt in batch])
        sight.start(keys_by_query(keys))
        made.append(([at(keys=keys, by_value=by, total=True) for by in kinds], rows))
        return made[-1][0]

    with tapping(model, sight):
        for batch, cap in read(model, prompts, keep, batch_size=batch_size, progress=name if progress else None):
            wanted, rows = made.pop()
            hidden = ~sight.seen.any(-1)
            sums = [(cap[each].nan_to_num(0.0) * rows[:, None, None]).sum(-1) for each in wanted]
            sums = [total.masked_fill(hidden, torch.nan) for total in sums]
            values.append(sums[0] / rows.sum(1)[:, None, None])
            weighted.append(sums[-1] / rows.sum(1)[:, None, None])
            whole.append(sums[0] / torch.tensor(batch.lengths)[:, None, None])
    return HeadScores(
        name=name,
        per_prompt=torch.cat(values),
        unit="share of attention",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"by_value": by_value},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={"mul": torch.cat(whole), **({"by_value": torch.cat(weighted)} if both else {})},
        seed=seed,
        labels=tuple(f"{length} tokens" for length in prompts.lengths),
    )


def table(listed: list[Targets]) -> tuple[Tensor, Tensor]:
    """Int [b q n] key positions, -1 where there are fewer, and Bool [b q], the queries that have any."""
    width = max(len(targets) for targets in listed)
    deep = max(1, *(len(keys) for targets in listed for keys in targets))
    keys = torch.full((len(listed), width, deep), -1)
    for b, targets in enumerate(listed):
        for q, wanted in enumerate(targets):
            keys[b, q, : len(wanted)] = torch.tensor(wanted, dtype=torch.int64)
    return keys, (keys >= 0).any(-1)
