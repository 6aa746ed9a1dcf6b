"""Profiles: each head is steered alone and scored without generation, in rounds that keep the better half."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interp.analyses.measures.continuations import ContinuationScorer, Cost, entropies, margins
from interp.analyses.results.codec import result
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, Edits
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

Score = Literal["margin", "accuracy", "entropy"]


@result
@dataclass(frozen=True, eq=False)
class Profile(Result):
    """The effect of steering, head by head: a score table, and the heads in the order of the rounds they stayed in.

    Args:
        scores: Gain over the unmodified model; NaN for prompts before which a head had left.
        ranking: Heads, best first: heads that stayed longer come before those that left, then by their gain.
    """

    scores: HeadScores
    ranking: tuple[Head, ...]

    @property
    def cost(self) -> dict[str, float]:
        """Prompts, forward passes and continuations that the profile took."""
        return self.scores.settings["cost"]

    @property
    def provenance(self) -> Provenance | None:
        """Model and versions that the profile belongs to."""
        return self.scores.provenance

    def heads(self, k: int) -> HeadSet:
        """The first k heads of the ranking.

        Args:
            k: Number of heads.

        Raises:
            UsageError: If k is below 1 or above the number of heads.
        """
        if not 0 < k <= len(self.ranking):
            raise UsageError(
                f"k={k} is not between 1 and {len(self.ranking)}, the heads of the profile; give such a k."
            )
        return HeadSet(tuple(self.ranking[:k]))

    def helpful(self, above: float = 0.0) -> HeadSet:
        """Heads that were measured on every prompt and gained more than a value, as ACT chooses its heads.

        Args:
            above: Least gain.
        """
        return HeadSet(tuple(h for h in self.ranking if self.scores[h] > above and self.is_complete(h)))

    def is_complete(self, head: Head) -> bool:
        """Whether a head was measured on every prompt."""
        return not bool(self.scores.per_prompt[:, head.layer, head.head].isnan().any())

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row per head in the order of the ranking: rank, name, gain, interval, prompts."""
        frame = self.scores.to_frame().set_index("name", drop=False).loc[[str(head) for head in self.ranking]]
        frame = frame.assign(
            rank=range(1, len(frame) + 1),
            prompts=[int((~self.scores.per_prompt[:, h.layer, h.head].isnan()).sum()) for h in self.ranking],
        )
        return frame[["rank", "name", "layer", "head", "value", "low", "high", "prompts"]].reset_index(drop=True)

    def summary(self, top: int = 10) -> str:
        """The first heads of the ranking as text: gain [95 % interval], and the number of prompts.

        Args:
            top: Number of heads to list.
        """
        rows = self.to_frame().head(top).to_dict("records")
        return "\n".join(
            f"{r['name']:8s} {r['value']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]  {r['prompts']} prompts"
            for r in rows
        )


def profile(
    model: nn.Module,
    prompts: Prompts,
    edit: Edit | Edits,
    *,
    heads: HeadSet | None = None,
    keep: int = 50,
    start: int = 4,
    score: Score = "margin",
    batch_size: int = 4,
    rows: int = 32,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Profile:
    """Steer each head alone and measure its gain, in rounds that halve the heads and double the prompts.

    `gain[n l h]` is the score of prompt n with `edit` in that head alone, minus its score without. With
    `start=len(prompts)` every head is measured on every prompt.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with `meta["right"]` and `meta["wrong"]`, see `tasks.get`; `seed` draws their order.
        edit: An edit of attention, or several added up.
        heads: Candidates, by default all heads.
        keep: Heads that are measured on all prompts.
        start: Prompts of the first round.
        score: "margin" is the log-probability per token of the best right continuation minus that of the best wrong
            one, "accuracy" whether the margin is above 0, "entropy" minus the entropy over the continuations, which
            needs no labels.
        batch_size: Number of prompts in a batch. Every forward pass holds all prompts of a batch, for one or more
            heads.
        rows: Number of sequences per forward pass, where each sequence is one prompt with one head steered.
        seed: Seed of the order of prompts, and of heads with equal gains.
        folder: Finished parts are stored here, so that a killed profile continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        Profile: the gains as HeadScores, and the ranking.

    Raises:
        UsageError: For an unknown score, no heads, or an edit of head outputs (Gate, Offset).
        PromptError: If a prompt has no right or wrong continuations.

    Examples:
        >>> from dataclasses import replace
        >>> meta = {"right": [[5]], "wrong": [[6]]}
        >>> batch = replace(prompts, items=tuple(replace(prompt, meta=meta) for prompt in prompts))
        >>> found = interp.steer.profile(model, batch, interp.steer.Boost("first", 9.0), start=2)
        >>> found.scores.per_prompt.shape, len(found.ranking)
        (torch.Size([2, 2, 4]), 8)

    Source:
        Zhang et al. 2311.02262, section 3.2: each head alone, ranked by task score, by generation on 1,000 prompts.

    Differs:
        Given continuations are scored, and heads leave in rounds.

    Limits:
        Does not show the effect of heads together, and ranks heads that left early by few prompts. The gains of heads
        that stayed are those of heads chosen on the same prompts: too high, by about the width of their intervals.
    """
    if score not in ("margin", "accuracy", "entropy"):
        raise UsageError(f"unknown score {score!r}; choose from 'margin', 'accuracy', 'entropy'.")
    if heads is not None and not len(heads):
        raise UsageError("the set of heads is empty; name at least one head, or give None for all.")
    if keep < 1 or start < 1:
        raise UsageError(f"keep={keep}, start={start}; give at least 1 head and 1 prompt.")
    layout = HeadLayout.of(model)
    left = list(layout.all() if heads is None else heads)
    layout.check(HeadSet(tuple(left)))
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=random).tolist()
    # the order of heads with equal gains
    tie_order = dict(zip(left, torch.randperm(len(left), generator=random).tolist(), strict=True))
    about = Provenance.of(model, prompts.tokenizer, seed=seed)
    gains = torch.full((len(prompts), layout.layers, layout.heads), torch.nan)
    made = about.config_hash, about.weights_hash, about.dtype, about.versions
    parts = Parts.of(folder, "profile", [made, prompts.fingerprint(), list(edit_dicts(edit)), score, batch_size])
    cost, rounds, gone = Cost(), [], []
    done, target = 0, min(start, len(prompts))
    with _bar(prompts, left, keep, start, progress) as bar:
        while done < len(prompts):
            for first in range(done, target, batch_size):
                chosen = order[first : min(first + batch_size, target)]
                batch = replace(prompts, items=tuple(prompts[i] for i in chosen))
                part = parts.get([chosen, list(map(str, left))], partial(_gains, model, batch, edit, left, score, rows))
                for number, row in zip(chosen, part["gains"], strict=True):
                    for head, gain in zip(left, row, strict=True):
                        gains[number, head.layer, head.head] = gain
                read, layers, continuations = part["cost"].tolist()
                cost += Cost(int(read), layers, int(continuations))
                bar.update(len(chosen) * len(left))
            rounds.append([len(left), target])
            means = gains.nanmean(0)
            left.sort(key=lambda head: (-float(means[head]), tie_order[head]))
            done, target = target, min(2 * target, len(prompts))
            if done < len(prompts) and len(left) > keep:
                half = max(keep, math.ceil(len(left) / 2))
                gone, left = left[half:] + gone, sorted(left[:half])
    ranking = [*left, *gone]
    found = HeadScores(
        name=f"steer:{'+'.join(type(e).__name__ for e in Edits(()) + edit).lower()}",
        per_prompt=gains,
        unit={"margin": "nats per token", "accuracy": "share right", "entropy": "nats"}[score],
        kv_heads=layout.kv_heads,
        settings={
            "edit": list(edit_dicts(edit)),
            "score": score,
            "rounds": rounds,
            "ranking": list(map(str, ranking)),
            "cost": {"prompts": cost.prompts, "forwards": cost.layers, "continuations": cost.continuations},
            "prompts": prompts.fingerprint(),
        },
        provenance=about,
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", number)) for number, prompt in enumerate(prompts)),
    )
    return Profile(found, tuple(ranking))


def _gains(
    model: nn.Module, prompts: Prompts, edit: Edit | Edits, heads: list[Head], score: Score, rows: int
) -> dict[str, Tensor]:
    """Gains `[p i]` of some prompts under head sets of one head each, and their cost."""
    made = ContinuationScorer(model, prompts, edit)
    scores = made.under([HeadSet((head,)) for head in heads], rows)
    gains = continuation_scores(scores, made, score) - continuation_scores(made.base[:, None], made, score)
    return {"gains": gains, "cost": torch.tensor(list(vars(made.cost).values()), dtype=torch.float64)}


def continuation_scores(scores: Tensor, made: ContinuationScorer, score: Score) -> Tensor:
    """A score of each prompt under each head set, from the log-probabilities of its continuations; higher is better.

    Args:
        scores: Log-probabilities `[p i o]` of prompts, head sets and continuations.
        made: The scorer that they come from.
        score: As in `profile`.

    Returns:
        Float `[p i]`.
    """
    if score == "entropy":
        return -entropies(scores)
    margin = margins(scores, made.options)
    return margin if score == "margin" else (margin > 0).float()


def intersection(profiles: Sequence[Profile], k: int) -> HeadSet:
    """PASTA's multi-task set: heads among the first k of every profile.

    Args:
        profiles: One profile for each task.
        k: Number of heads of each.

    Raises:
        UsageError: If there are no profiles, or no head is in all of them.

    Source:
        Zhang et al. 2311.02262, section 3.2.

    Limits:
        Does not show that the heads help on a task that was not profiled.
    """
    if not profiles:
        raise UsageError("no profiles were given; give one for each task.")
    both = profiles[0].heads(k)
    for other in profiles[1:]:
        both = both & other.heads(k)
    if not len(both):
        raise UsageError(f"no head is among the first {k} of all {len(profiles)} profiles; give a larger k.")
    return both


def directions(up: Profile, down: Profile) -> tuple[HeadSet, HeadSet]:
    """ZeroTuning's labels: heads that gain from more attention to the first token, and heads that gain from less.

    A head that gains from neither is in no set, one that gains from both is in the set with the larger gain. Heads that
    either profile did not measure on every prompt are in no set.

    Args:
        up: Profile of ZeroTuning with gamma above 1.
        down: Profile with gamma below 1, on the same prompts.

    Returns:
        Heads for a gamma above 1, and heads for one below.

    Source:
        Han et al. 2505.11739, which labels heads on held-out data.

    Differs:
        Labels come from profiles, on the same prompts.

    Limits:
        Does not show the effect of the two sets together, since each gain is that of one head alone.
    """
    known = ~(up.scores.per_prompt.isnan().any(0) | down.scores.per_prompt.isnan().any(0))
    one, other = (torch.where(known, x.scores.values, 0.0) for x in (up, down))
    return HeadSet.from_mask((one > 0) & ~(other > one)), HeadSet.from_mask((other > 0) & (other > one))


def edit_dicts(edit: Edit | Edits) -> tuple[dict[str, Any], ...]:
    """The fields of each part of an edit, as JSON gives them back."""
    return tuple(json.loads(json.dumps([part.to_dict() for part in Edits(()) + edit])))


def _bar(prompts: Prompts, heads: list[Head], keep: int, start: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    total, left, done, target = 0, len(heads), 0, min(start, len(prompts))
    while done < len(prompts):
        total += left * (target - done)
        done, target = target, min(2 * target, len(prompts))
        left = max(min(keep, left), math.ceil(left / 2)) if done < len(prompts) else left
    return tqdm(total=total, desc="profile", unit="prompt x head", disable=not progress, delay=2, leave=False)
