"""Which heads to steer: each head steered alone, scored without generating, in rounds that keep the better half."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interp.analyses.measures.continuations import ContinuationScorer, Cost, entropies, margins
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError, UsageError
from interp.hooks.edit.edit import Edit, Edits
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

Score = Literal["margin", "accuracy", "entropy"]


@dataclass(frozen=True)
class Profile:
    """What steering does, head by head: a score table, and the heads in the order of the rounds they stayed in."""

    scores: HeadScores
    """gain over the model as it is; NaN where a head had left"""
    ranking: tuple[Head, ...]
    """best first: heads that stayed longer come before those that left, then by their gain"""

    @property
    def cost(self) -> dict[str, float]:
        return self.scores.settings["cost"]

    def heads(self, k: int) -> HeadSet:
        """The first k of the ranking."""
        if not 0 < k <= len(self.ranking):
            raise UsageError(f"{k} heads of a profile of {len(self.ranking)}: give a number from 1 to that.")
        return HeadSet(tuple(self.ranking[:k]))

    def helpful(self, above: float = 0.0) -> HeadSet:
        """Heads that were asked every prompt and gained more than a value: ACT's rule for its head set."""
        return HeadSet(tuple(h for h in self.ranking if self.scores[h] > above and self.whole(h)))

    def whole(self, head: Head) -> bool:
        """Whether a head was measured on every prompt."""
        return not bool(self.scores.per_prompt[:, head.layer, head.head].isnan().any())

    def save(self, path: str | Path) -> Path:
        """Write the scores, which carry the ranking; `load` reads them."""
        return self.scores.save(path)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> "Profile":
        """Read what save wrote. With `model`, a profile of another model raises ScoreError."""
        scores = HeadScores.load(path, model)
        if "ranking" not in scores.settings:
            raise ScoreError(
                f"{path} holds scores '{scores.name}' and no profile: give a file that Profile.save wrote."
            )
        return cls(scores, tuple(map(Head.parse, scores.settings["ranking"])))


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
    """Steer each head alone and measure what it gains, in rounds that halve the heads and double the prompts.

    gain[p l h] = score of prompt p with `edit` in that head alone less its score without. score: "margin", the
    log-probability per token of the best right continuation less that of the best wrong one; "accuracy", whether that
    is above 0; "entropy", minus the entropy over the continuations, which needs no labels.
    prompts: with meta["right"] and meta["wrong"] (see tasks.get), in an order drawn by `seed`. heads: candidates, by
    default all. keep: heads that are measured on all prompts. start: prompts of the first round. rows: of one forward.
    start=len(prompts) measures every head on every prompt.
    folder: finished parts are kept there, and a profile that was cut goes on with the same numbers.
    Source: Zhang et al. 2311.02262, section 3.2 (each head alone, ranked by task score, by generation on 1,000
    prompts). Differs: given continuations are scored, and heads leave in rounds.
    Cannot show: what heads do together; how a head ranks that left early, by a few prompts. Gains of the heads that
    stayed are of heads chosen for them, on the same prompts: too high, by about as much as their intervals are wide.
    """
    if score not in ("margin", "accuracy", "entropy"):
        raise UsageError(f"score={score!r} is none: take 'margin', 'accuracy' or 'entropy'.")
    if heads is not None and not len(heads):
        raise UsageError("heads is an empty set: name at least one head, or None for all.")
    if keep < 1 or start < 1:
        raise UsageError(f"keep={keep}, start={start}: give at least 1 head and 1 prompt.")
    layout = HeadLayout.of(model)
    left = list(layout.all() if heads is None else heads)
    layout.check(HeadSet(tuple(left)))
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=random).tolist()
    # of heads that are alike
    lot = dict(zip(left, torch.randperm(len(left), generator=random).tolist(), strict=True))
    about = Provenance.of(model, prompts.tokenizer, seed=seed)
    gains = torch.full((len(prompts), layout.layers, layout.heads), torch.nan)
    made = about.config_hash, about.weights_hash, about.dtype, about.versions
    what = [made, prompts.fingerprint(), [e.to_dict() for e in Edits(()) + edit], score, batch_size]
    parts = Parts.of(folder, "profile", what)
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
            left.sort(key=lambda head: (-float(means[head]), lot[head]))
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
            "edit": [e.to_dict() for e in Edits(()) + edit],
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
    """ "gains" [p i] of some prompts, and what they cost."""
    made = ContinuationScorer(model, prompts, edit)
    scores = made.under([HeadSet((head,)) for head in heads], rows)
    gains = scored(scores, made, score) - scored(made.base[:, None], made, score)
    return {"gains": gains, "cost": torch.tensor(list(vars(made.cost).values()), dtype=torch.float64)}


def scored(scores: Tensor, made: ContinuationScorer, score: Score) -> Tensor:
    """[p i] from log-probabilities [p i o]: higher is better."""
    if score == "entropy":
        return -entropies(scores)
    margin = margins(scores, made.options)
    return margin if score == "margin" else (margin > 0).float()


def intersection(profiles: Sequence[Profile], k: int) -> HeadSet:
    """PASTA's multi-task set: heads among the first k of every profile.

    Raises UsageError where there is none. Source: Zhang et al. 2311.02262, section 3.2.
    Cannot show: that the heads help on a task that was not profiled.
    """
    if not profiles:
        raise UsageError("no profiles were given: give one for each task.")
    both = profiles[0].heads(k)
    for other in profiles[1:]:
        both = both & other.heads(k)
    if not len(both):
        raise UsageError(f"no head is among the first {k} of all {len(profiles)} profiles: take a larger k.")
    return both


def directions(up: Profile, down: Profile) -> tuple[HeadSet, HeadSet]:
    """ZeroTuning's labels, from profiles with gamma above and below 1: heads that gain from more attention to the
    first token, and heads that gain from less. One that gains from neither is in none, from both in the better.
    Heads that either profile did not ask every prompt are in none.
    Source: Han et al. 2505.11739, which labels heads on held-out data. Differs: by profiles, on the same prompts.
    Cannot show: what the two sets do together; each gain is of one head alone.
    """
    known = ~(up.scores.per_prompt.isnan().any(0) | down.scores.per_prompt.isnan().any(0))
    one, other = (torch.where(known, x.scores.values, 0.0) for x in (up, down))
    return HeadSet.from_mask((one > 0) & ~(other > one)), HeadSet.from_mask((other > 0) & (other > one))


@dataclass(frozen=True)
class Choice:
    """One setting among those that were compared."""

    name: str
    edit: Edits
    score: float
    low: float
    high: float
    """95% interval over prompts"""
    common: float
    """share of prompts that get the same continuation: near 1 where low entropy is mere collapse"""


def choose(
    model: nn.Module, prompts: Prompts, settings: Mapping[str, Edit | Edits], *, score: Score = "margin", seed: int = 0,
    batch_size: int = 4,
) -> list[Choice]:  # fmt: skip
    """Compare settings, heads included, on the same prompts, best first: for k, alpha, gamma on a dev split.

    score as in `profile`; "entropy" is ZeroTuning's mode without labels. The model as it is comes along as "as loaded".
    Source: ours; choosing by entropy is Han et al. 2505.11739, section 4.
    Cannot show: how a setting does on prompts that it was not chosen on.
    """
    rows: dict[str, list[Tensor]] = {}
    best: dict[str, list[tuple[int, ...]]] = {}
    for batch in prompts.batches(batch_size):
        made = ContinuationScorer(model, batch, Edits(()))
        for name, edit in {"as loaded": Edits(()), **settings}.items():
            scores = made.base[:, None] if name == "as loaded" else made.together(edit)
            rows.setdefault(name, []).append(scored(scores, made, score)[:, 0])
            first = scores[:, 0].argmax(-1).tolist()
            best.setdefault(name, []).extend(ids[i] for ids, i in zip(made.options.ids, first, strict=True))
    random = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(prompts), (1000, len(prompts)), generator=random)
    found = []
    for name, parts in rows.items():
        values = torch.cat(parts)
        low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
        common = max(best[name].count(ids) for ids in best[name]) / len(best[name])
        edits = Edits(()) + settings[name] if name in settings else Edits(())
        found.append(Choice(name, edits, float(values.mean()), low, high, common))
    return sorted(found, key=lambda choice: -choice.score)


def _bar(prompts: Prompts, heads: list[Head], keep: int, start: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    total, left, done, target = 0, len(heads), 0, min(start, len(prompts))
    while done < len(prompts):
        total += left * (target - done)
        done, target = target, min(2 * target, len(prompts))
        left = max(min(keep, left), math.ceil(left / 2)) if done < len(prompts) else left
    return tqdm(total=total, desc="profile", unit="prompt x head", disable=not progress, delay=2, leave=False)
