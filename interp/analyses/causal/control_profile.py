"""The causal profile of the heads of an analysis, with the measure of its control."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from interp.analyses.causal.ablated_measures import KINDS, NATS, NEUTRAL, neutral_loss
from interp.analyses.causal.causal_profile import causal_profile
from interp.analyses.causal.controls import Answers, Control
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trials import Trials
from interp.hooks.edit.ablation import AblationKind
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts


def control_profile(
    control: Control,
    model: nn.Module,
    prompts: Prompts,
    scores: HeadScores,
    *,
    n_heads: int,
    n_random_sets: int,
    kinds: Sequence[AblationKind] = KINDS,
    reference: Prompts | None = None,
    neutral: Prompts | None = None,
    batch_size: int = 8,
    held_out: bool = False,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> Trials:
    """Dose and kind of ablation, see `causal_profile`, with the measure of a control and the loss on neutral text.

    Args:
        control: The control of the analysis.
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: As the control takes them.
        scores: The scores under test.
        n_heads: Largest number of heads; 1 and a third of it are measured too.
        n_random_sets: Number of random sets of each condition and size.
        kinds: The ablations.
        reference: Prompts that the ablations "mean" and "resample" take values from.
        neutral: Plain texts, whose loss is a further measure.
        batch_size: Number of prompts per forward pass.
        held_out: Whether the scores were made from other prompts. Otherwise a control whose measure the scores are made
            of has no test.
        seed: Seed of the random heads, of "resample" and of the intervals.
        folder: Where finished conditions are kept, so that an interrupted profile continues.
        progress: Show a progress bar.

    Returns:
        Trials: Under the name of the scores.

    Raises:
        UsageError: As in `causal_profile`.
        PromptError: If the prompts lack what the measure needs.
    """
    used, counted = control.showing(model, control.used(prompts), batch_size)
    name, measure = control.measure_on(used, batch_size)
    about = [type(control).__name__, control.new_tokens, *(each and each.fingerprint() for each in (used, neutral))]
    found = causal_profile(
        model,
        scores,
        {name: measure} | ({} if neutral is None else {NEUTRAL: neutral_loss(neutral, batch_size)}),
        kinds=kinds,
        sizes=sizes_of(control, n_heads, scores.layout),
        shown=control.shown(name),
        reference=reference,
        n_random_sets=n_random_sets,
        seed=seed,
        folder=folder,
        about=about,
        progress=progress,
    )
    titled = replace(
        found,
        title=f"{control.title}, by number of heads and kind of ablation",
        units={} if neutral is None else {NEUTRAL: NATS},
        shares=(name,) if isinstance(control, Answers) else (),
    )
    return control.describe(titled, name, counted, held_out)


def sizes_of(control: Control, n_heads: int, layout: HeadLayout) -> list[int]:
    """Numbers of heads of a profile: the largest that the control ablates, a third of it, and one.

    Args:
        control: The control of the analysis.
        n_heads: Number of heads from the top of the scores.
        layout: Layers and heads of the model.
    """
    most = max(control.head_counts(n_heads, layout))
    return sorted({1, max(1, most // 3), most})
