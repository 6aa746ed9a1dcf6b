"""Sahara: the group of heads whose ablation turns the model's representation of a set of prompts furthest."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.causal.random_sets import Condition, RandomSets
from interp.analyses.causal.sweep import last_hidden, sweep_sets
from interp.analyses.identify._subspace import angle, angle_interval
from interp.analyses.identify.ships import Ablation
from interp.analyses.measures.refusals import REPLY_TOKENS, refused_numbers
from interp.analyses.registry import analysis
from interp.analyses.results.codec import result
from interp.analyses.results.files import digest
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.analyses.results.trial import Trial
from interp.analyses.results.trials import Trials
from interp.analyses.tasks.refused import refused
from interp.analyses.tasks.task import Judge
from interp.errors import UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

GROUP = "sahara"
"""condition of the groups"""
OWN_GROUP = (
    "Each group was chosen by this angle on these prompts, so it exceeds random groups even where no head matters; "
    "there is no test."
)


@result
@dataclass(frozen=True, eq=False)
class SaharaResult(Result):
    """Groups of growing size compared with random groups, and the score of every head at the first step."""

    scores: HeadScores
    """degrees by which the subspace turns with each head ablated alone"""
    ranking: tuple[Head, ...]
    """heads in the order in which they joined the group"""
    groups: Trials
    """the measures "degrees" and "one_minus_cos" under "sahara", "random" and "random by layer", with intervals"""

    @property
    def provenance(self) -> Provenance | None:
        """The model and versions that the numbers come from."""
        return self.scores.provenance

    def heads(self, k: int) -> HeadSet:
        """The first k heads of the group.

        Args:
            k: Number of heads.

        Raises:
            UsageError: If the group has fewer heads.
        """
        if not 0 < k <= len(self.ranking):
            raise UsageError(f"k={k} for a group of {len(self.ranking)} heads; give 1 to {len(self.ranking)}.")
        return HeadSet(tuple(self.ranking[:k]))

    def to_frame(self) -> Any:
        """The groups as a pandas DataFrame, see `Trials.to_frame`."""
        return self.groups.to_frame()

    def summary(self, top: int = 10) -> str:
        """The heads in the order in which they joined, then one line for each condition, size and measure.

        Args:
            top: Number of heads that are listed.
        """
        return "\n".join([f"sahara: {', '.join(map(str, self.ranking[:top]))}", self.groups.summary(top)])

    def __str__(self) -> str:
        return self.summary()


@analysis(
    title="Sahara", group="safety", order=41, joint=True, resumable=True, own_prompts=False, in_all=False,
    source_settings={"size": 1, "ablation": "uniform", "components": 1},
)  # fmt: skip
def sahara(
    model: nn.Module,
    prompts: Prompts,
    *,
    size: int = 3,
    ablation: Ablation = "uniform",
    components: int = 1,
    judge: Judge | None = refused,
    max_new_tokens: int = REPLY_TOKENS,
    heads: Any = None,
    n_random_sets: int = 10,
    batch_size: int = 8,
    rows: int | None = None,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> SaharaResult:
    """Grow a group of heads, at each step by the head whose ablation turns the subspace of the prompts furthest.

    `M[p m]` is the input of the unembedding at the last token of each prompt, and U its first `components` left
    singular vectors, for the unmodified model and with a group ablated. `phi` is the sum of the principal angles
    between the two subspaces, in degrees, computed in float64. The cost is `size * l * h` forward passes of each
    prompt, less the parts that they share.

    Only requests are used that the unmodified model refuses.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Requests, see `tasks.refusal`.
        size: Number of heads of the largest group.
        ablation: "uniform" or "zero", see `ships`.
        components: Number of left singular vectors.
        judge: Function of a reply and its prompt that returns whether it refuses. None uses all requests, for those
            that the model is known to refuse.
        max_new_tokens: Number of new tokens of a reply that is judged.
        heads: Anything that `HeadSet.parse` takes, by default all heads; only these can join the group.
        n_random_sets: Number of random groups of each size that are matched by layer. Up to 3 more, from all layers,
            are shown.
        batch_size: Number of prompts in a batch. Every forward pass holds all prompts of a batch, for one or more
            groups.
        rows: Largest number of sequences per forward pass, where each sequence is one prompt with one group ablated,
            but never fewer than the prompts of a batch; by default as many as fit into free memory.
        seed: Seed of the random groups and of the confidence intervals.
        folder: Where finished pieces are kept, so that an interrupted analysis continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        SaharaResult: The ranking, the score of each head at the first step, and the groups as Trials. The interval of a
        group is over prompts, see `angle_interval`; over several random groups `Trials.mean` gives the mean, the least
        and the largest.

    Raises:
        UsageError: If the model refuses fewer than `components + 1` requests, since one prompt always spans the same
            line, the prompts have no tokenizer and there is a judge, or the group would take more than half of the
            heads.

    Examples:
        >>> found = interp.identify.sahara(model, prompts, size=1, n_random_sets=1, judge=None)
        >>> found.groups.conditions
        ('sahara', 'random', 'random by layer')

    Source:
        Zhou et al., On the Role of Attention Heads in LLM Safety (ICLR 2025), section 4 and algorithm 1.

    Differs:
        Small angles are computed by their sines, where the released code takes the arccos of a clamped product.
        `1 - cos` is reported together with the degrees, and random groups are added. Requests that the model does not
        refuse are left out.

    Limits:
        Does not show in which direction the representation turned, nor that replies change; the angle has no sign.
    """
    layout = HeadLayout.of(model)
    chosen = layout.all() if heads is None else HeadSet.parse(heads, layout)
    layout.check(chosen)
    n_given, reading = len(prompts), {"batch_size": batch_size, "progress": progress}
    counted = refused_numbers(model, prompts, judge, max_new_tokens=max_new_tokens, **reading)
    if len(counted) <= components or components < 1:
        which = "" if judge is None else f" that the model refuses, of {n_given},"
        raise UsageError(
            f"{len(counted)} prompts{which} span no subspace that could turn with components={components}; give at "
            "least 1 component and more such prompts than components."
        )
    prompts = replace(prompts, items=tuple(prompts[number] for number in counted))
    largest = min(len(chosen), layout.size // 2)
    if not 0 < size <= largest or n_random_sets < 1:
        raise UsageError(
            f"size={size} and n_random_sets={n_random_sets} make no groups; give 1 to {largest} heads and at least one "
            "random set."
        )
    settings: dict[str, Any] = {**reading, "rows": rows, "folder": folder}
    hidden = partial(sweep_sets, model, prompts, intervention=ablation, metric=last_hidden, **settings)
    base = hidden([HeadSet(())]).values[:, 0].double()
    added: list[Head] = []
    trials: list[Trial] = []
    first = torch.full((1, layout.layers, layout.heads), torch.nan)
    for step in range(size):
        left = [head for head in chosen if head not in added]
        found = hidden([HeadSet((*added, head)) for head in left]).values.double()
        turned = torch.tensor([angle(base, found[:, i], components) for i in range(len(left))], dtype=torch.float64)
        if not step:
            for head, degrees in zip(left, turned.tolist(), strict=True):
                first[0, head.layer, head.head] = degrees
        added.append(left[int(turned.argmax())])
        group = HeadSet(tuple(added))
        sets = RandomSets(group, layout, n_random_sets, seed, GROUP)
        tried = [Condition(GROUP, group), *sets.free(), *sets.by_layer()]
        after = hidden([condition.heads for condition in tried]).values.double()
        trials += [_trial(condition, base, after[:, i], components, seed) for i, condition in enumerate(tried)]
    source = Provenance.of(model, prompts.tokenizer, seed=seed)
    scores = HeadScores(
        name=f"sahara:{ablation}",
        per_prompt=first,
        unit="degrees",
        kv_heads=layout.kv_heads,
        settings={"components": components, "prompts": prompts.fingerprint(), "ranking": list(map(str, added))},
        provenance=source,
        seed=seed,
        labels=(f"{len(prompts)} of {n_given} prompts together, {digest(prompts.fingerprint())}",),
    )
    groups = Trials(
        name=f"sahara:{ablation}",
        trials=tuple(trials),
        intervention=ablation,
        title="Groups of heads",
        units={"degrees": "degrees"},
        notes=(OWN_GROUP,),
        seed=seed,
        settings={"components": components, "n_random_sets": n_random_sets, "prompts": prompts.fingerprint()},
        provenance=source,
    )
    return SaharaResult(scores, tuple(added), groups)


def _trial(condition: Condition, before: Tensor, after: Tensor, components: int, seed: int) -> Trial:
    degrees = angle(before, after, components)
    low, high = angle_interval(before, after, components, seed)
    return Trial(
        condition=condition.name,
        values={"degrees": (degrees,), "one_minus_cos": (_one_minus_cos(degrees),)},
        heads=condition.heads,
        size=len(condition.heads),
        draw=condition.draw,
        intervals={"degrees": (low, high), "one_minus_cos": (_one_minus_cos(low), _one_minus_cos(high))},
    )


def _one_minus_cos(degrees: float) -> float:
    # exact where the angle is small
    return 2 * math.sin(math.radians(degrees) / 2) ** 2
