"""What the detectors on token positions share: the keys each query should look at, and the mean over these queries."""

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

Targets = list[list[int]]
"""for each query position the key positions that count, none where the query does not count"""


def shift(prompt: Prompt) -> int | None:
    """How far back the first copy lies, for prompts whose spans "first" and "second" say so."""
    if "first" in prompt.spans and "second" in prompt.spans:
        return prompt.spans["second"][0][0] - prompt.spans["first"][0][0]
    return None


def later_copies(prompt: Prompt) -> list[range]:
    """The positions of each copy after the first; tasks.repeated calls further ones copy3, copy4, ..."""
    return [range(*prompt.spans[name][0]) for name in prompt.spans if name == "second" or name.startswith("copy")]


def earlier(prompt: Prompt) -> Targets:
    """The earlier positions that hold the same id, for each position.

    Where spans "first" and "second" mark two copies it is the place in the copy before, so that a control whose second
    half is not a copy is measured at the very same places.
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


def check_targets(prompts: Prompts, name: str, targets: Callable[[Prompt], Targets]) -> None:
    """Raise PromptError for a prompt in which no query has a target."""
    for number, prompt in enumerate(prompts):
        if not any(targets(prompt)):
            raise PromptError(
                f"prompt {number} for '{name}' has no query with a target (no token comes twice): "
                "use tasks.repeated or longer text."
            )


def score_targets(
    model: nn.Module,
    prompts: Prompts,
    name: str,
    targets: Callable[[Prompt], Targets],
    *,
    by_value: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Mean over the queries that have a target of the attention on their targets, per prompt.

    score[n l h] = mean over q with targets of sum over k in targets[q] of pattern[n l h q k]. extras["mul"] [n l h]
    divides the same sum by all queries, which is TransformerLens' "mul" measure. Raises PromptError for a prompt in
    which no query has a target.
    """
    values, whole = [], []
    made: list[tuple[At, Tensor]] = []

    def keep(batch: Prompts) -> At:
        check_targets(batch, name, targets)
        keys, rows = table([targets(prompt) for prompt in batch])
        made.append((at(keys=keys, by_value=by_value, total=True), rows))
        return made[-1][0]

    for batch, cap in read(model, prompts, keep, batch_size=batch_size, progress=name if progress else None):
        wanted, rows = made.pop()
        total = (cap[wanted].nan_to_num(0.0) * rows[:, None, None]).sum(-1)
        values.append(total / rows.sum(1)[:, None, None])
        whole.append(total / torch.tensor(batch.lengths)[:, None, None])
    return HeadScores(
        name=name,
        per_prompt=torch.cat(values),
        unit="share of attention",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"by_value": by_value},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={"mul": torch.cat(whole)},
        seed=seed,
        labels=tuple(f"{length} tokens" for length in prompts.lengths),
    )


def table(listed: list[Targets]) -> tuple[Tensor, Tensor]:
    """Int [b q n] key positions, -1 for none, and Bool [b q], the queries that have one."""
    width = max(len(targets) for targets in listed)
    deep = max(1, *(len(keys) for targets in listed for keys in targets))
    keys = torch.full((len(listed), width, deep), -1)
    for b, targets in enumerate(listed):
        for q, wanted in enumerate(targets):
            keys[b, q, : len(wanted)] = torch.tensor(wanted, dtype=torch.int64)
    return keys, (keys >= 0).any(-1)
