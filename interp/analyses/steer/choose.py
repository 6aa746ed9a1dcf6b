"""Settings compared on the same prompts, to choose the heads and the strength of an edit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.measures.continuations import ContinuationScorer
from interp.analyses.results import intervals
from interp.analyses.results.codec import result
from interp.analyses.results.files import Parts
from interp.analyses.results.trial import BASELINE
from interp.analyses.steer.check import steered_replies
from interp.analyses.steer.load_edits import edits_from_dicts
from interp.analyses.steer.profile import Score, continuation_scores, edit_dicts
from interp.hooks.edit.edit import Edit, Edits
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts


@result
@dataclass(frozen=True)
class SettingComparison:
    """One setting among those that `choose` compared."""

    name: str
    """"baseline" is the unmodified model"""
    edit: tuple[dict[str, Any], ...] = field(repr=False)
    """as `Edit.to_dict` gives each part"""
    score: float
    low: float
    high: float
    """95 % interval of the score over prompts"""
    common: float
    """share of prompts that get the most common continuation; near 1 where a low entropy is a mere collapse"""
    accuracy: float | None = None
    """share of prompts whose greedy reply is right, where replies were generated"""

    @property
    def edits(self) -> Edits:
        """The edit of the setting."""
        return edits_from_dicts(self.edit)

    def __str__(self) -> str:
        text = f"{self.name:18s} {self.score:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return text if self.accuracy is None else f"{text}  {self.accuracy:.0%} right"


def choose(
    model: nn.Module,
    prompts: Prompts,
    settings: Mapping[str, Edit | Edits],
    *,
    score: Score = "margin",
    judge: Callable[[str, Prompt], bool] | None = None,
    max_new_tokens: int = 32,
    stop: str | None = None,
    batch_size: int = 4,
    reply_batch_size: int = 8,
    seed: int = 0,
    folder: str | Path | None = None,
) -> list[SettingComparison]:
    """Compare settings of edits, heads included, on the same prompts, such as those of a dev split.

    The unmodified model is compared too, as "baseline". With a judge, settings are ordered by the share of right greedy
    replies, then by score: a set of heads may make the right form of an answer likely and lose its content.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with `meta["right"]` and `meta["wrong"]`, see `tasks.get`.
        settings: Name -> edit.
        score: As in `profile`; "entropy" is the mode of ZeroTuning without labels.
        judge: Reply and prompt -> whether the reply is right. None generates no replies.
        max_new_tokens: Longest reply.
        stop: Text that ends a reply.
        batch_size: Number of prompts per forward pass of scoring.
        reply_batch_size: Number of prompts per forward pass of generation.
        seed: Seed of the confidence intervals over prompts.
        folder: Verdicts on replies are stored here, so that a killed comparison continues.

    Returns:
        The settings, best first.

    Raises:
        PromptError: If a prompt has no right or wrong continuations.

    Examples:
        >>> from dataclasses import replace
        >>> meta = {"right": [[5]], "wrong": [[6]]}
        >>> batch = replace(prompts, items=tuple(replace(prompt, meta=meta) for prompt in prompts))
        >>> found = interp.steer.choose(model, batch, {"strong": interp.steer.Boost("first", 9.0)})
        >>> sorted(each.name for each in found)
        ['baseline', 'strong']

    Source:
        This package; the choice by entropy is that of Han et al. 2505.11739, section 4.

    Limits:
        Does not show how a setting performs on prompts on which it was not chosen.
    """
    rows: dict[str, list[Tensor]] = {}
    best: dict[str, list[tuple[int, ...]]] = {}
    every = {BASELINE: Edits(()), **{name: Edits(()) + edit for name, edit in settings.items()}}
    for batch in prompts.batches(batch_size):
        made = ContinuationScorer(model, batch, Edits(()))
        for name, edit in every.items():
            scores = made.base[:, None] if name == BASELINE else made.together(edit)
            rows.setdefault(name, []).append(continuation_scores(scores, made, score)[:, 0])
            first = scores[:, 0].argmax(-1).tolist()
            best.setdefault(name, []).extend(ids[i] for ids, i in zip(made.options.ids, first, strict=True))
    about = Provenance.of(model, prompts.tokenizer, seed=seed)
    made_by = [about.config_hash, about.weights_hash, about.dtype, about.versions, prompts.fingerprint()]
    parts = Parts.of(folder if judge else None, "replies", [made_by, max_new_tokens, stop, reply_batch_size])
    found = []
    for name, edit in every.items():
        accuracy = None
        if judge is not None:

            def verdicts(edit: Edits = edit) -> dict[str, Tensor]:
                replies = steered_replies(
                    model, prompts, edit, max_new_tokens=max_new_tokens, stop=stop, batch_size=reply_batch_size
                )
                return {"right": torch.tensor([judge(r.text, p) for r, p in zip(replies, prompts, strict=True)])}

            accuracy = float(parts.get(edit_dicts(edit), verdicts)["right"].double().mean())
        mean, low, high = intervals.mean_interval(torch.cat(rows[name]), seed=seed)
        common = max(best[name].count(ids) for ids in best[name]) / len(best[name])
        found.append(SettingComparison(name, edit_dicts(edit), mean, low, high, common, accuracy))
    return sorted(found, key=lambda each: (-(each.accuracy or 0.0), -each.score))
