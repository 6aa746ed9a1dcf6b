"""Stages that test the top heads of an analysis, or named heads, against random heads."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from interp.analyses.causal import controls
from interp.analyses.causal.ablation_test import ablation_test
from interp.analyses.causal.control_profile import control_profile, sizes_of
from interp.analyses.registry import Analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.analyses.results.set_test import MIN_RANDOM_SETS
from interp.analyses.tasks import standard
from interp.analyses.views.head_roles import threshold_of
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts
from interp.runs.stage import Stage, single
from interp.runs.stages.analyses import heads_missing, own_prompts

if TYPE_CHECKING:
    from interp.runs.plan import ScorePlan
    from interp.runs.run import Run


N_NEUTRAL = 2
"""neutral texts of each control, few so that a run takes little longer"""


class _Inputs(NamedTuple):
    """The prompts of a control, and the settings that all controls of a run share."""

    control: Any
    prompts: Any
    of_analysis: bool
    """whether the prompts are of the kind that the analysis reads"""
    kinds: Any
    """names of ablations"""
    settings: dict[str, Any]


def _scores(run: "Run", entry: Analysis) -> HeadScores:
    """The scores of an analysis with the threshold that it declares, above which heads have the tested role."""
    scores: Any = run.result(entry.name)
    return scores if scores.threshold is not None else replace(scores, threshold=threshold_of(entry.name, scores))


def control_stage(entry: Analysis, plan: "ScorePlan", tokenizer: Any, own: Prompts | None) -> Stage:
    """The stage that tests the top heads of an analysis against random heads."""
    control, prompts, of_analysis, kinds, settings = _inputs(entry, plan, tokenizer, own)

    def work(run: "Run", steps: Path) -> Result:
        named = run.named_heads
        return control(
            run.model, prompts, _scores(run, entry), ablation=plan.ablation, kinds=kinds,
            heads=named if len(named) and not of_analysis else None, folder=steps, **settings,
        )  # fmt: skip

    def ready(run: "Run") -> str:
        return "" if of_analysis or len(run.named_heads) else heads_missing(run, entry.name)

    return single(
        f"{entry.name}.control",
        work,
        needs=(entry.name,),
        ready=ready,
        prompts=() if of_analysis else ((prompts, control.new_tokens),),
        cost=lambda model: control.cost(
            model, prompts, plan.batch_size, n_heads=plan.n_heads, n_random_sets=plan.n_random_sets,
            n_kinds=len(set(kinds) - {plan.ablation}),
        ),
    )  # fmt: skip


def profile_stage(entry: Analysis, plan: "ScorePlan", tokenizer: Any, own: Prompts | None) -> Stage:
    """The stage that ablates and keeps several numbers of heads of an analysis, under several ablations."""
    control, prompts, _, kinds, settings = _inputs(entry, plan, tokenizer, own)
    # a profile tests many sets
    n_random_sets = min(plan.n_random_sets, MIN_RANDOM_SETS)

    def work(run: "Run", steps: Path) -> Result:
        few: dict[str, Any] = settings | {"n_random_sets": n_random_sets}
        return control_profile(control, run.model, prompts, _scores(run, entry), kinds=kinds, folder=steps, **few)

    def cost(model: Any) -> Any:
        n_sizes = len(sizes_of(control, plan.n_heads, HeadLayout.of(model)))
        # ablated, kept and by depth; the first two have random sets
        conditions = 1 + len(kinds) * n_sizes * (3 + 2 * n_random_sets)
        return control.cost_of_conditions(model, prompts, plan.batch_size, conditions)

    return single(
        f"{entry.name}.profile",
        work,
        needs=(entry.name,),
        ready=lambda run: heads_missing(run, entry.name),
        cost=cost,
    )


def named_heads_stage(plan: "ScorePlan", tokenizer: Any) -> Stage:
    """The stage that tests the heads that a user names, where no analysis of the plan is tested by answers."""
    control = controls.answers().with_sizes(plan.sizes)
    prompts = standard.check_needles(plan.sizes, tokenizer)
    neutral = standard.neutral_texts(plan.sizes, tokenizer)[:N_NEUTRAL]
    reference = _reference_needles(control, plan, tokenizer)
    kinds: Any = tuple(kind for kind in plan.kinds if kind != plan.ablation)

    def work(run: "Run", steps: Path) -> Result:
        return ablation_test(
            run.model, prompts, run.named_heads, n_random_sets=plan.n_random_sets, ablation=plan.ablation, kinds=kinds,
            reference=reference, neutral=neutral, n_prompts=control.n_prompts, max_new_tokens=control.new_tokens,
            batch_size=plan.batch_size, seed=plan.seed, folder=steps,
        )  # fmt: skip

    return single(
        "heads.control",
        work,
        prompts=((prompts, control.new_tokens),),
        cost=lambda model: control.cost(
            model, prompts, plan.batch_size, n_heads=plan.n_heads, n_random_sets=plan.n_random_sets,
            n_kinds=len(set(kinds) - {plan.ablation}),
        ),
    )  # fmt: skip


def _inputs(entry: Analysis, plan: "ScorePlan", tokenizer: Any, own: Prompts | None) -> _Inputs:
    """Prompts and settings of a control. Its prompts are none of those that chose the heads, except a user's own."""
    control, standard_prompts = entry.control.with_sizes(plan.sizes), entry.prompts

    def drawn(seed: int) -> Any:
        made: Any = own_prompts(entry, plan, own)
        if made is None and standard_prompts is not None:
            made = standard_prompts(replace(plan.sizes, seed=plan.seed + seed), tokenizer)
        return made[0] if isinstance(made, tuple) else made

    given = control.prompts(plan.sizes, tokenizer)
    prompts = drawn(standard.CHECK_SEED) if given is None else given
    reference = drawn(standard.REFERENCE_SEED) if given is None else _reference_needles(control, plan, tokenizer)
    reference = control.used(reference)[: standard.N_REFERENCE]
    # a single prompt has no other prompt to take values from
    kinds = tuple(kind for kind in plan.kinds if kind != "resample" or len(reference) > 1)
    settings = {
        "n_heads": plan.n_heads, "n_random_sets": plan.n_random_sets, "reference": reference,
        "neutral": standard.neutral_texts(plan.sizes, tokenizer)[:N_NEUTRAL], "batch_size": plan.batch_size,
        "held_out": own is None, "seed": plan.seed,
    }  # fmt: skip
    return _Inputs(control, prompts, given is None, kinds, settings)


def _reference_needles(control: Any, plan: "ScorePlan", tokenizer: Any) -> Prompts:
    """Needle prompts that mean and resample ablations take values from."""
    sizes = replace(plan.sizes, seed=plan.seed + standard.REFERENCE_SEED)
    made: Prompts = control.prompts(sizes, tokenizer)
    return made[: standard.N_REFERENCE]
