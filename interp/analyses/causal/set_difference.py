"""Set difference: whether two tables find different heads, by ablating the heads that only one of them has."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from interp.analyses.causal.ablated_measures import NATS, NEUTRAL, AblatedMeasures, Measure, accuracy, neutral_loss
from interp.analyses.causal.random_sets import Condition, RandomSets
from interp.analyses.measures.losses import SpanLoss, token_losses
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.set_test import MIN_RANDOM_SETS, N_RANDOM_SETS
from interp.analyses.results.trial import BASELINE, RANDOM_BY_LAYER, Trial
from interp.analyses.results.trials import Trials
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import check_eval
from interp.hooks.prompts.prompts import Prompts

ANSWERS, REPEATED = "accuracy", "loss on the second copy of repeated tokens"
BOTH = "both"
"""condition of the heads that both tables have"""


def _inputs(run: Any) -> dict[str, Any]:
    """The two tables of a run, and prompts that chose neither."""
    needles, repeated, neutral = standard.check_prompts(run.sizes, run.tokenizer)
    made = {
        "a": run.scores["retrieval"], "b": run.scores["induction"], "needles": needles, "repeated": repeated,
        "neutral": neutral, "max_new_tokens": run.sizes.reply_tokens, "n_heads": run.n_heads,
        "n_random_sets": min(run.n_random_sets, MIN_RANDOM_SETS), "ablation": run.ablation,
    }  # fmt: skip
    return made | run.settings.get("set_difference", {})


@analysis(
    title="Retrieval heads against induction heads", group="long context", order=32, resumable=True,
    needs=("retrieval", "induction"), inputs=_inputs, own_prompts=lambda own, sizes: None, in_all=False,
)  # fmt: skip
def set_difference(
    model: nn.Module,
    a: HeadScores,
    b: HeadScores,
    *,
    needles: Prompts | None = None,
    repeated: Prompts | None = None,
    neutral: Prompts | None = None,
    n_heads: int = 10,
    ablation: AblationKind = "zero",
    reference: Prompts | None = None,
    max_new_tokens: int = REPLY_TOKENS,
    n_random_sets: int = N_RANDOM_SETS,
    batch_size: int = 8,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> Trials:
    """Ablate the top heads that only one of two tables has, and those that both have, on up to three measures.

    `only a = top(a) - top(b)`, `only b = top(b) - top(a)`, `both = top(a) & top(b)`. Each of the three sets is compared
    with separate random sets, as many heads of each layer, see `Trials.set_test`. A random set may share heads with the
    set it is compared with, and has no top head of either table that is not in that set.

    Two tables that correlate may still find different heads. Where they do, the heads of one table alone are needed on
    its own measure and not on that of the other, and the same holds the other way around.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        a: Head scores, such as those of `retrieval`.
        b: Other head scores of the model, such as those of `induction`.
        needles: Prompts with an answer in their meta: the accuracy of greedy replies.
        repeated: Prompts with a span "second", such as `tasks.repeated`: the loss on the second copy.
        neutral: Plain texts: the loss of all tokens.
        n_heads: Number of top heads of each table.
        ablation: "zero", "mean", "resample", "uniform" or "first", see `ablate`.
        reference: Prompts that the ablations "mean" and "resample" take values from.
        max_new_tokens: Number of new tokens of a reply.
        n_random_sets: Number of random sets for each of the three head sets; a verdict needs at least 39.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the random heads, of "resample" and of the intervals.
        folder: Where finished points are kept, so that an interrupted analysis continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        Trials: Up to three measures under "baseline", "only a", "only b" (with the names of the tables), "both" and
        "random by layer". A set without heads is left out.

    Raises:
        UsageError: If the tables have one name or the same top heads, there are no prompts, or no random sets.
        ScoreError: If the tables differ in shape.

    Examples:
        >>> from dataclasses import replace
        >>> other = replace(scores, name="other", per_prompt=scores.per_prompt.flip(2))
        >>> found = interp.set_difference(model, scores, other, neutral=prompts, n_heads=1, n_random_sets=1)
        >>> found.tested
        ('only induction', 'only other')

    Source:
        This package.

    Limits:
        A difference of few heads has a small effect. A set that is not beyond random sets may still matter: compare the
        intervals of both sets before you conclude that the tables differ.
    """
    layout = HeadLayout.of(model)
    check_eval(model)
    sets = _sets(a, b, n_heads)
    measures: dict[str, Measure] = {}
    if needles is not None:
        measures[ANSWERS] = accuracy(needles, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if repeated is not None:
        measures[REPEATED] = lambda model: token_losses(model, repeated, batch_size, loss=SpanLoss("second"))
    if neutral is not None:
        measures[NEUTRAL] = neutral_loss(neutral, batch_size)
    if not measures:
        raise UsageError("there are no prompts to measure on; give needles=, repeated= or neutral=.")
    given = [None if prompts is None else prompts.fingerprint() for prompts in (needles, repeated, neutral)]
    points = AblatedMeasures(
        model, measures, list(sets.values()), reference=reference, seed=seed, folder=folder,
        about=[*given, max_new_tokens], name="set difference", progress=progress,
    )  # fmt: skip
    every = HeadSet(tuple(head for heads in sets.values() for head in heads))

    def trial(condition: Condition) -> Trial:
        return points.trial(condition, ablation)

    with points.bar:
        trials = [base] = [trial(Condition(BASELINE, HeadSet(())))]
        tested = [trial(Condition(name, heads)) for name, heads in sets.items()]
        trials += tested
        for own in tested:
            random = RandomSets(own.heads, layout, n_random_sets, seed, own.condition, every, is_single=False)
            trials += random.run(trial, base, own, free=False, every_measure=True)
    return Trials(
        name="set_difference",
        trials=tuple(trials),
        intervention=ablation,
        title=f"Heads of {a.name} against heads of {b.name}",
        shares=(ANSWERS,),
        units={name: NATS for name in measures if name != ANSWERS},
        control=RANDOM_BY_LAYER,
        claim="larger effect",
        n_random_sets=n_random_sets,
        seed=seed,
        settings={
            "a": a.name, "b": b.name, "n_heads": n_heads, "ablation": ablation, "n_random_sets": n_random_sets,
            "max_new_tokens": max_new_tokens, "prompts": given,
        },
        provenance=points.provenance,
    )  # fmt: skip


def _sets(a: HeadScores, b: HeadScores, n_heads: int) -> Mapping[str, HeadSet]:
    """The head sets of the three conditions, as far as they have heads."""
    if a.name == b.name:
        raise UsageError(f"both tables are named {a.name!r}; give two tables with different names.")
    a.compare(b, k=1)
    one, other = (HeadSet(tuple(table.top(n_heads))) for table in (a, b))
    if one == other:
        raise UsageError(
            f"the top {n_heads} of {a.name!r} and of {b.name!r} are the same {len(one)} heads, so nothing tells them "
            "apart; give another n_heads or other tables."
        )
    found = {f"only {a.name}": one - other, f"only {b.name}": other - one, BOTH: one & other}
    return {name: heads for name, heads in found.items() if len(heads)}
