"""Causal curves: measures of a model as more and more heads are ablated, in the order of rankings and at random."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from interp.analyses.causal.ablated_measures import NATS, NEUTRAL, AblatedMeasures, Measure, neutral_loss
from interp.analyses.causal.further_conditions import depth_conditions, further_conditions
from interp.analyses.causal.random_sets import Condition, RandomSets, excluded, mean
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.set_test import N_RANDOM_SETS
from interp.analyses.results.shown_behaviour import COUNTED
from interp.analyses.results.trial import BASELINE, DRAWN, RANDOM_BY_LAYER, Trial
from interp.analyses.results.trials import Trials
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.layers import check_eval
from interp.hooks.prompts.prompts import Prompts


def causal_curve(
    model: nn.Module,
    rankings: Mapping[str, HeadScores | Sequence[Head]],
    measures: Mapping[str, Measure],
    *,
    sizes: Sequence[int] = (1, 3, 5, 10),
    shown: Mapping[str, float] | None = None,
    ablation: AblationKind = "zero",
    kinds: Sequence[AblationKind] = (),
    reference: Prompts | None = None,
    neutral: Prompts | None = None,
    depth: bool = True,
    sufficiency: bool = False,
    n_random_sets: int = N_RANDOM_SETS,
    stop_early: bool = True,
    until: float | None = None,
    seed: int = 0,
    folder: Any = None,
    about: Any = None,
    progress: bool = False,
) -> Trials:
    """Take every measure with the first heads of each ranking ablated, for several numbers of heads.

    Random heads are the control. Every ranking has its own for each size: `n_random_sets` sets with as many heads in
    each layer, drawn from all heads of the layer, and up to 3 of other heads of any layer. None has other heads above
    the threshold of the ranking than the tested ones. By default the draws end early where the verdict on the first
    measure is certain, see `Trials.set_test`; `Trials.findings` corrects for several rankings and sizes.

    A ranking by depth alone is the baseline: the first heads of the table's depth profile, in which every head scores
    the mean of its layer. Further ablations, the ablation of all other heads of the role ("kept") and the loss on
    neutral text are measured without random heads; `causal_profile` measures random heads for them too.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        rankings: Name -> head scores (highest first), or heads in order.
        measures: Name -> function of the model that returns one number for each of its prompts. It runs on the
            ablated model. See `measures.refusals` and `measures.losses.token_losses`.
        sizes: Numbers of heads, each at most half of the model's.
        shown: Measure -> number that a prompt must exceed on the unmodified model, which shows the behaviour there, as
            0.5 for right answers. The others are left out of this measure. Where the unmodified model shows the
            behaviour of the first measure on no prompt, no heads are ablated.
        ablation: "zero", "mean", "resample", "uniform" or "first", see `ablate`.
        kinds: Other ablations of the tested heads.
        reference: Prompts that the ablations "mean" and "resample" take values from.
        neutral: Plain texts, whose loss is a further measure of the baseline and of tested heads.
        depth: Add the first heads of the depth profile of each table.
        sufficiency: Add the ablation of all other heads of the role: those above the threshold of a table, or above
            its floor where it has no threshold.
        n_random_sets: Number of random sets that are matched by layer, for each ranking and size; a verdict needs at
            least 39.
        stop_early: End the draws where the verdict on the first measure is certain, see `ablation_test`; with several
            rankings or sizes only once too many sets have as large an effect. False draws all sets.
        until: A ranking ends at the size at which the first measure is at most this share of its baseline.
        seed: Seed of the random heads, of "resample" and of the confidence intervals.
        folder: Where finished points are kept, so that an interrupted curve continues with the same numbers.
        about: What the measures depend on, such as their prompts, as JSON can hold it. Needed with `folder`.
        progress: Show a progress bar.

    Returns:
        Trials: All measures under "baseline", each ranking, its depth profile, "random" and "random by layer"; `size`
        is the number of heads.

    Raises:
        UsageError: If a size leaves too few heads for a random set, a ranking is too short, has a head twice or the
            name of a control, a measure gives no finite numbers, or `folder` is given without `about`.

    Examples:
        >>> from interp.analyses.measures.losses import token_losses
        >>> measures = {"loss": lambda model: token_losses(model, prompts)}
        >>> curve = interp.causal_curve(model, {"induction": scores}, measures, sizes=(1, 2), n_random_sets=1)
        >>> curve.conditions, curve.sizes("induction")
        (('baseline', 'induction', 'induction by depth', 'random', 'random by layer'), (1, 2))

    Source:
        The curves of Wu et al. 2404.15574 and of Zhou et al. (ICLR 2025).

    Differs:
        Random sets matched by layer and the depth profile are added.

    Limits:
        Does not show that the heads do the task: other heads may take over, or be disturbed.
    """
    layout = HeadLayout.of(model)
    ordered = {name: _heads_in_order(found, layout.size) for name, found in rankings.items()}
    check_eval(model)
    _check(ordered, measures, sizes, layout, n_random_sets)
    taken = {**measures, **({} if neutral is None else {NEUTRAL: neutral_loss(neutral)})}
    points = AblatedMeasures(
        model,
        taken,
        [HeadSet(tuple(order[:size])) for order in ordered.values() for size in sizes if size <= len(order)],
        shown=shown,
        reference=reference,
        seed=seed,
        folder=folder,
        about=about if neutral is None or about is None else [about, neutral.fingerprint()],
        name="causal curve",
        progress=progress,
    )
    n_tests = len(rankings) * len(set(sizes))

    def trial(condition: Condition) -> Trial:
        return points.trial(condition, ablation, list(measures))

    with points.bar:
        base = points.trial(Condition(BASELINE, HeadSet(())), ablation)
        trials, floor = [base], -torch.inf if until is None else until * mean(base)
        tested: dict[tuple[str, int], Trial] = {}
        for name, order in ({} if points.shows_nothing else ordered).items():
            for size in sorted({size for size in sizes if size <= len(order)}):
                tested[name, size] = points.trial(Condition(name, HeadSet(tuple(order[:size]))), ablation)
                if mean(tested[name, size]) <= floor:
                    break
        trials += tested.values()
        for (name, _), own in tested.items():
            others = further_conditions(name, rankings[name], own.heads, (ablation, *kinds), sufficiency)
            trials += [points.trial(condition, kind) for condition, kind in others]
            trials += [
                points.trial(each, ablation) for each in depth_conditions(name, rankings[name], own.heads, depth)
            ]
        for (name, _), own in tested.items():
            found = rankings[name]
            other = excluded(found, own.heads) if isinstance(found, HeadScores) else HeadSet(())
            sets = RandomSets(own.heads, layout, n_random_sets, seed, name, other, stop_early, n_tests == 1)
            trials += sets.run(trial, base, own)
    return Trials(
        name=next(iter(rankings)),
        trials=tuple(trials),
        intervention=ablation,
        title="Causal curve",
        control=RANDOM_BY_LAYER,
        claim="larger effect",
        units={} if neutral is None else {NEUTRAL: NATS},
        n_random_sets=n_random_sets,
        seed=seed,
        settings={
            "sizes": sorted(set(sizes)), "ablation": ablation, "kinds": list(kinds), "n_random_sets": n_random_sets,
            "until": until, **({COUNTED: points.counted} if points.counted else {}),
        },
        provenance=points.provenance,
    )  # fmt: skip


def _heads_in_order(found: HeadScores | Sequence[Head], n: int) -> list[Head]:
    return found.top(n) if isinstance(found, HeadScores) else list(found)


def _check(
    ordered: Mapping[str, list[Head]],
    measures: Mapping[str, Measure],
    sizes: Sequence[int],
    layout: HeadLayout,
    n_random_sets: int,
) -> None:
    """Raise for rankings, measures or sizes that make no curve."""
    for name, order in ordered.items():
        layout.check(HeadSet(tuple(order)))
        if name in (BASELINE, *DRAWN):
            raise UsageError(f"ranking {name!r} has the name of a control; give it another name.")
        if len(set(order)) < len(order):
            raise UsageError(f"ranking {name!r} has a head twice; give each head once.")
    if not ordered or not measures or n_random_sets < 1:
        raise UsageError(
            f"{len(ordered)} rankings, {len(measures)} measures and n_random_sets={n_random_sets} make no curve; give "
            "at least one of each."
        )
    wrong = [size for size in sizes if not 0 < size <= layout.size // 2]
    if wrong or not sizes:
        raise UsageError(
            f"sizes={tuple(sizes)} do not fit a model of {layout.size} heads; give 1 to {layout.size // 2} heads."
        )
    short = {name: len(order) for name, order in ordered.items() if len(order) < max(sizes)}
    if short and min(short.values()) < min(sizes):
        name = min(short, key=short.__getitem__)
        raise UsageError(
            f"ranking {name!r} has too few heads ({short[name]}) for sizes={tuple(sizes)}; give smaller sizes."
        )
