"""Causal curves: measures of a model as more and more heads are ablated, in the order of rankings and at random."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.causal.ablation_test import source_of_numbers
from interp.analyses.causal.random_sets import Condition, RandomSets, excluded, mean
from interp.analyses.causal.shared_forwards import SharedForwards
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.set_test import N_RANDOM_SETS
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER, Trial
from interp.analyses.results.trials import Trials
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind, ablate
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.layers import check_eval
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

Measure = Callable[[nn.Module], Tensor]
"""a function of the model that returns `[p]` numbers, one for each prompt of the measure"""


def causal_curve(
    model: nn.Module,
    rankings: Mapping[str, HeadScores | Sequence[Head]],
    measures: Mapping[str, Measure],
    *,
    sizes: Sequence[int] = (1, 3, 5, 10),
    ablation: AblationKind = "zero",
    reference: Prompts | None = None,
    n_random_sets: int = N_RANDOM_SETS,
    until: float | None = None,
    seed: int = 0,
    folder: Any = None,
    about: Any = None,
    progress: bool = False,
) -> Trials:
    """Take every measure with the first heads of each ranking ablated, for several numbers of heads.

    Random heads are the control. Every ranking has its own for each size: `n_random_sets` sets with as many heads of
    each layer, drawn from all heads of the layer, and up to 3 of other heads of any layer. None has other heads above
    the threshold of the ranking than the tested ones. The draws end early where no further set can change the verdict
    on the first measure, see `Trials.set_test`; `Trials.findings` corrects for several rankings and sizes.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        rankings: Name -> head scores (highest first), or heads in order.
        measures: Name -> function of the model that returns one number for each of its prompts. It runs on the
            ablated model. See `measures.refusals` and `measures.losses.token_losses`.
        sizes: Numbers of heads, each at most half of the model's.
        ablation: "zero", "mean", "resample", "uniform" or "first", see `ablate`.
        reference: Prompts that the ablations "mean" and "resample" take values from.
        n_random_sets: Number of random sets that are matched by layer, for each ranking and size; a verdict needs at
            least 39.
        until: A ranking ends at the size at which the first measure is at most this share of its baseline.
        seed: Seed of the random heads, of "resample" and of the intervals.
        folder: Where finished points are kept, so that an interrupted curve continues with the same numbers.
        about: What the measures depend on, such as their prompts, as JSON can hold it. Needed with `folder`.
        progress: Show a progress bar.

    Returns:
        Trials: All measures under "baseline", each ranking, "random" and "random by layer"; `size` is the number of
        heads.

    Raises:
        UsageError: If a size leaves too few heads for a random set, a ranking is too short, has a head twice or the
            name of a control, a measure gives no finite numbers, or `folder` is given without `about`.

    Examples:
        >>> from interp.analyses.measures.losses import token_losses
        >>> measures = {"loss": lambda model: token_losses(model, prompts)}
        >>> curve = interp.causal_curve(model, {"induction": scores}, measures, sizes=(1, 2), n_random_sets=1)
        >>> curve.conditions, curve.sizes("induction")
        (('baseline', 'induction', 'random', 'random by layer'), (1, 2))

    Source:
        The curves of Wu et al. 2404.15574 and of Zhou et al. (ICLR 2025).

    Differs:
        Random sets matched by layer are added.

    Limits:
        Does not show that the heads do the task: other heads may take over, or be disturbed.
    """
    layout = HeadLayout.of(model)
    ordered = {name: _heads_in_order(found, layout.size) for name, found in rankings.items()}
    check_eval(model)
    _check(ordered, measures, sizes, layout, n_random_sets)
    if folder is not None and about is None:
        raise UsageError("a folder needs about=; give what the measures depend on, such as their prompts.")
    source = Provenance.of(model, seed=seed)
    referred = None if reference is None else [reference.fingerprint(), seed]
    parts = Parts.of(folder, "curve", [*source_of_numbers(source), ablation, list(measures), about, referred])

    shared = SharedForwards.of(
        model, [HeadSet(tuple(order[:size])) for order in ordered.values() for size in sizes if size <= len(order)]
    )
    bar = _bar(progress)

    def trial(condition: Condition) -> Trial:
        def work() -> dict[str, Tensor]:
            passes = shared.resume(condition.heads) if len(condition.heads) else shared.record()
            with ablate(model, condition.heads, ablation, reference=reference, seed=seed), passes:
                return {str(i): _numbers(name, measure(model)) for i, (name, measure) in enumerate(measures.items())}

        made = parts.get(str(condition.heads), work)
        values = {name: tuple(made[str(i)].tolist()) for i, name in enumerate(measures)}
        bar.update()
        return Trial(
            condition.name, values, condition.heads, len(condition.heads), condition.draw, facts=condition.facts
        )

    with bar:
        base = trial(Condition(BASELINE, HeadSet(())))
        trials, floor = [base], -torch.inf if until is None else until * mean(base)
        tested: dict[tuple[str, int], Trial] = {}
        for name, order in ordered.items():
            for size in sorted({size for size in sizes if size <= len(order)}):
                tested[name, size] = trial(Condition(name, HeadSet(tuple(order[:size]))))
                if mean(tested[name, size]) <= floor:
                    break
        trials += tested.values()
        for (name, _), own in tested.items():
            found = rankings[name]
            other = excluded(found, own.heads) if isinstance(found, HeadScores) else HeadSet(())
            trials += RandomSets(own.heads, layout, n_random_sets, seed, name, other).run(trial, mean(base), mean(own))
    return Trials(
        name=next(iter(rankings)),
        trials=tuple(trials),
        intervention=ablation,
        title="Causal curve",
        control=RANDOM_BY_LAYER,
        claim="larger effect",
        n_random_sets=n_random_sets,
        seed=seed,
        settings={"sizes": sorted(set(sizes)), "ablation": ablation, "n_random_sets": n_random_sets, "until": until},
        provenance=source,
    )


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
        if name in (BASELINE, RANDOM, RANDOM_BY_LAYER):
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


def _numbers(name: str, values: Any) -> Tensor:
    found = torch.as_tensor(values, dtype=torch.float32)
    if found.ndim != 1 or not len(found) or not bool(found.isfinite().all()):
        raise UsageError(
            f"measure {name!r} returned shape {tuple(found.shape)}, or a number that is not finite; return one finite "
            "number for each prompt."
        )
    return found


def _bar(progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(desc="causal curve", unit="head set", disable=not progress, delay=2, leave=False)
