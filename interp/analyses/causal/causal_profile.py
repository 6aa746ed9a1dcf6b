"""Causal profiles: a head set by number of heads and kind of ablation, ablated or kept, each with its random sets."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from torch import nn

from interp.analyses.causal.ablated_measures import KINDS, AblatedMeasures, Measure
from interp.analyses.causal.further_conditions import depth_conditions, kept, under
from interp.analyses.causal.random_sets import Condition, KeptSets, RandomSets, excluded, role_of
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.set_test import MIN_RANDOM_SETS, Claim
from interp.analyses.results.shown_behaviour import COUNTED
from interp.analyses.results.trial import BASELINE, RANDOM_BY_LAYER, Trial
from interp.analyses.results.trials import Trials
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import check_eval
from interp.hooks.prompts.prompts import Prompts

NONE_LEFT = "No other head is above the threshold of {}, so there is no condition in which the tested heads are kept."


def causal_profile(
    model: nn.Module,
    scores: HeadScores,
    measures: Mapping[str, Measure],
    *,
    kinds: Sequence[AblationKind] = KINDS,
    sizes: Sequence[int] = (1, 3, 10),
    sufficiency: bool = True,
    shown: Mapping[str, float] | None = None,
    reference: Prompts | None = None,
    n_random_sets: int = MIN_RANDOM_SETS,
    seed: int = 0,
    folder: Any = None,
    about: Any = None,
    progress: bool = False,
) -> Trials:
    """Measure dose and kind: several numbers of top heads, under several ablations, ablated or kept.

    For scores named "retrieval" the conditions of the ablation "zero" are:

    - "retrieval (zero)" (necessity): the first heads of the table are ablated. The control is random heads, as many of
      each layer, without heads above the threshold.
    - "retrieval kept (zero)" (sufficiency): all other heads of the role are ablated, those above the threshold of the
      table, or above its floor where it has no threshold. The control is random choices of as many heads of the role
      that are kept in place of the first ones.
    - "retrieval by depth (zero)": the first heads of the depth profile, in which every head scores the mean of its
      layer.

    The draws end early where no further set can change the verdict on any measure, see `Trials.set_test`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        scores: Head scores. Heads at the floor of the table are never among the first.
        measures: Name -> function of the model that returns one number for each of its prompts, such as `accuracy` and
            `neutral_loss`. The first one is that of the task.
        kinds: Ablations, see `ablate`.
        sizes: Numbers of heads, each at most half of the model's. Sizes above the number of ranked heads are left out.
        sufficiency: Measure the conditions in which the heads are kept.
        shown: Measure -> number that a prompt must exceed on the unmodified model, as in `causal_curve`.
        reference: Prompts that "mean" and "resample" take values from.
        n_random_sets: Number of random sets for each condition and size; a verdict needs at least 39.
        seed: Seed of the random heads, of "resample" and of the intervals.
        folder: Where finished points are kept, so that an interrupted profile continues with the same numbers.
        about: What the measures depend on, such as their prompts, as JSON can hold it. Needed with `folder`.
        progress: Show a progress bar.

    Returns:
        Trials: All measures under all conditions; `size` is the number of heads that are ablated or kept. The figure
        has a line for each condition and a band for its random sets.

    Raises:
        UsageError: If there is no measure, kind, random set or ranked head, a size does not fit the model, or an
            ablation has no reference prompts.

    Examples:
        >>> from interp.analyses.causal.ablated_measures import neutral_loss
        >>> measures = {"loss": neutral_loss(prompts)}
        >>> found = interp.causal_profile(model, scores, measures, kinds=("zero",), sizes=(1, 2), n_random_sets=1)
        >>> found.tested
        ('induction (zero)', 'induction kept (zero)', 'induction by depth (zero)')

    Source:
        Wang et al. 2211.00593, sections 2.2 and 4 (mean ablation; a circuit is kept and everything else ablated), and
        Chan et al. 2022, "Causal scrubbing" (resampling).

    Differs:
        Only the other heads of the role are ablated, and not all other heads, since a model without most of its heads
        does nothing. Random sets are the control.

    Limits:
        Does not show which heads the tested ones work with: heads outside of the role are never ablated in "kept".
    """
    layout, name = HeadLayout.of(model), scores.name
    check_eval(model)
    order = scores.top(layout.size)
    _check(scores, len(order), measures, kinds, sizes, layout, n_random_sets, reference)
    heads = {size: HeadSet(tuple(order[:size])) for size in sorted(set(sizes)) if size <= len(order)}
    about = None if about is None else [about, "profile"]
    points = AblatedMeasures(
        model, measures, list(heads.values()), shown=shown, reference=reference, seed=seed, folder=folder, about=about,
        name="causal profile", progress=progress,
    )  # fmt: skip
    trials: list[Trial] = []
    claims: dict[str, Claim] = {}
    notes: dict[str, None] = {}
    with points.bar:
        base = points.trial(Condition(BASELINE, HeadSet(())), kinds[0])
        heads = {} if points.shows_nothing else heads

        def trial(condition: Condition, kind: AblationKind) -> Trial:
            return points.trial(condition, kind)

        for kind, chosen in product(kinds, heads.values()):
            own, take = under(name, kind), partial(trial, kind=kind)
            tested = take(Condition(own, chosen))
            # the same random heads under every ablation
            sets = RandomSets(chosen, layout, n_random_sets, seed, name, excluded(scores, chosen), is_single=False)
            random = sets.run(take, base, tested, free=False, every_measure=True)
            trials += [tested, *(replace(each, matched=own) for each in random)]
        for kind, chosen in product(kinds, heads.values()) if sufficiency else ():
            own, take, role = under(kept(name), kind), partial(trial, kind=kind), role_of(scores, chosen)
            if len(role) == len(chosen):
                notes[NONE_LEFT.format(name)] = None
                continue
            tested = take(Condition(own, role - chosen, n_tested=len(chosen)))
            random = KeptSets(chosen, role, n_random_sets, seed, name).run(take, base, tested, every_measure=True)
            trials += [tested, *(replace(each, matched=own) for each in random)]
            claims[own] = "smaller effect"
        for kind, chosen in product(kinds, heads.values()):
            for condition in depth_conditions(name, scores, chosen):
                trials.append(trial(replace(condition, name=under(condition.name, kind)), kind))
    return Trials(
        name=name,
        trials=(base, *trials),
        intervention=f"ablations: {', '.join(kinds)}",
        title="Dose and kind of ablation",
        control=RANDOM_BY_LAYER,
        claim="larger effect",
        claims=claims,
        n_random_sets=n_random_sets,
        notes=tuple(notes),
        seed=seed,
        settings={
            "kinds": list(kinds), "sizes": list(heads), "n_random_sets": n_random_sets,
            "reference": None if reference is None else reference.fingerprint(),
            **({COUNTED: points.counted} if points.counted else {}),
        },
        provenance=points.provenance,
    )  # fmt: skip


def _check(
    scores: HeadScores,
    n_ranked: int,
    measures: Mapping[str, Measure],
    kinds: Sequence[AblationKind],
    sizes: Sequence[int],
    layout: HeadLayout,
    n_random_sets: int,
    reference: Prompts | None,
) -> None:
    """Raise for what makes no profile."""
    if not measures or not kinds or n_random_sets < 1:
        raise UsageError(
            f"{len(measures)} measures, {len(kinds)} kinds and n_random_sets={n_random_sets} make no profile; give at "
            "least one of each."
        )
    if not sizes or not all(0 < size <= layout.size // 2 for size in sizes):
        raise UsageError(
            f"sizes={tuple(sizes)} do not fit a model of {layout.size} heads; give 1 to {layout.size // 2} heads."
        )
    if n_ranked < min(sizes):
        raise UsageError(
            f"the table {scores.name!r} ranks {n_ranked} heads, too few for sizes={tuple(sizes)}; give smaller "
            "sizes or other scores."
        )
    needing = [kind for kind in kinds if kind in ("mean", "resample")]
    if needing and reference is None:
        raise UsageError(
            f"ablation {needing[0]!r} needs reference prompts; give reference=, or kinds=('zero',) for none."
        )
