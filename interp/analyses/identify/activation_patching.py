"""Activation patching: how the answer changes when a head writes what it wrote in another run."""

from functools import partial
from typing import Any

from torch import nn

from interp.analyses import costs
from interp.analyses.causal import controls
from interp.analyses.identify._patching import patched
from interp.analyses.identify._prompt_pairs import Direction, Metric, effects
from interp.analyses.measures.answer_logits import logit_difference
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.hooks.prompts.prompts import Prompts


@analysis(
    title="Activation patching",
    group="patching",
    order=22,
    prompts=standard.ioi,
    paired=True,
    joint=True,
    resumable=True,
    own_prompts=False,
    control=controls.logit_difference(),
    cost=costs.patching(),
)
def activation_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts,
    metric: Metric = logit_difference,
    *,
    direction: Direction = "denoise",
    normalize: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its total effect: its z, at all positions, comes from the other run of the pair.

    `effect[n l h] = M_patched - M_corrupt` (denoise) or `M_clean - M_patched` (noise), so that a head that supports the
    clean answer is positive either way. `score[n l h] = effect[n l h] / D`, where D is the mean of M_clean - M_corrupt
    over the pairs that count (see below). The score of a head is thus a ratio of means.

    A pair counts where the model shows the behaviour, M_clean > M_corrupt. The scores of other pairs are NaN; if
    no pair counts, no head has a score. Give a metric that is higher on the clean prompts.

    To save time, the forward pass with a patched head starts at the layer of the head, from the stored residual stream
    of the run that is patched. The numbers are those of a whole pass. `scores.compare(other, k)` gives the overlap of
    the top k heads of two tables, such as those of two tasks, and the rank correlation.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        clean: Clean prompts, such as the first side of `tasks.ioi` or `tasks.colored_objects`.
        corrupt: The partner of each clean prompt, of equal token length.
        metric: By default the logit of the first token of the right answer minus that of the wrong one; the answers are
            `meta["right"][0]` and `meta["wrong"][0]` of the clean prompt, in every run. Else a function of the logits
            [b v] at the last position and the clean prompts [b] that gives [b].
        direction: "denoise" patches the clean run into the corrupt one (is the head sufficient?), "noise" the reverse
            (is it necessary?).
        normalize: Divide by D, so that 1 is a head that carries all of the difference. False gives the effect itself.
        batch_size: Number of sequences per forward pass, where each sequence is one pair with one head patched. A pass
            holds pairs of equal length, and as many heads of each as fit.
        seed: Seed of the confidence intervals over prompts.
        folder: Where finished batches of pairs are kept, so that an interrupted analysis continues with the same
            numbers.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, positive for a head that supports the clean answer, NaN for a pair
        that does not count. The extra "difference" holds M_clean - M_corrupt of each pair, the same for every head.
        With `normalize`, the setting "mean_difference" holds D.

    Raises:
        PromptError: If the prompts are not pairs of equal length, or have no answers.
        UsageError: If a setting is unknown, or the metric gives anything but finite numbers.
        ModelError: If no bridge can be made, or the model is in training mode.

    Examples:
        >>> answers = {"right": ["x"], "wrong": ["y"]}
        >>> clean = interp.Prompts.encode(tokenizer, [{"text": "x y x", "meta": answers}])
        >>> corrupt = interp.Prompts.encode(tokenizer, [{"text": "x y y", "meta": answers}])
        >>> interp.identify.activation_patching(model, clean, corrupt).per_prompt.shape
        torch.Size([1, 2, 4])

    Source:
        Meng et al. 2202.05262, Wang et al. 2211.00593; TransformerLens' get_act_patch_attn_head_out_all_pos.

    Differs:
        Scores are given for each pair, and either direction can be chosen. Effects are divided by the mean difference
        of the pairs that count. If each pair were divided by its own difference, pairs with a small difference would
        dominate the mean. Pairs without the behaviour are left out.

    Limits:
        Does not show by which path a head acts. Misses heads whose work other heads take over (backup heads). Intervals
        take the mean difference as known. Where only about half of the pairs count, the model shows the behaviour by
        chance.
    """
    name, measure = "activation_patching", partial(patched, metric, (), batch_size)
    return effects(
        name, model, clean, corrupt, metric, measure, direction, normalize, batch_size, seed, folder, progress
    )
