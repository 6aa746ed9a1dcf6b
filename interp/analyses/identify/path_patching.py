"""Path patching: how the answer changes through the direct path from a head to the logits."""

from functools import partial
from typing import Any, Literal

from torch import nn

from interp.analyses import costs
from interp.analyses.causal import controls
from interp.analyses.identify._patching import patched
from interp.analyses.identify._prompt_pairs import Direction, Metric, effects
from interp.analyses.measures.answer_logits import logit_difference
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts


@analysis(
    title="Path patching",
    group="patching",
    order=23,
    prompts=standard.ioi,
    paired=True,
    joint=True,
    resumable=True,
    own_prompts=False,
    control=controls.logit_difference(),
    cost=costs.patching(frozen=lambda settings: settings.get("mlps", "frozen") == "frozen"),
    source_settings={"mlps": "live", "direction": "noise"},
)
def path_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts,
    metric: Metric = logit_difference,
    *,
    mlps: Literal["frozen", "live"] = "frozen",
    direction: Direction = "noise",
    normalize: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its direct effect: its z comes from the other run, and z of all other heads is frozen.

    With `mlps="frozen"` only the path from the head to the logits is left. In the direction "noise" the last residual
    is then `r_clean + (z_corrupt[h d] - z_clean[h d]) W_O[h d m]` at the last position, read by the final norm, whose
    scale is computed anew, and the unembedding. A norm after attention (Gemma 2 and 3, OLMo 2) is computed anew as
    well.

    Scores, signs and the pairs that count are those of `activation_patching`: `score[n l h] = effect[n l h] / D`, where
    D is the mean of M_clean - M_corrupt over the pairs with M_clean > M_corrupt. `scores.compare(other, k)` compares
    two tables.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        clean: Clean prompts, such as the first side of `tasks.ioi` or `tasks.colored_objects`.
        corrupt: The partner of each clean prompt, of equal token length.
        metric: By default the logit difference of the clean prompts' meta["right"] and meta["wrong"] (first tokens).
            Else a function of the logits [b v] at the last position and the clean prompts [b] that gives [b].
        mlps: "frozen" keeps the MLPs of the patched run; "live" lets later MLPs respond, as the authors do.
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
        >>> interp.identify.path_patching(model, clean, corrupt).per_prompt.shape
        torch.Size([1, 2, 4])

    Source:
        Wang et al. 2211.00593; Merullo et al. 2310.08744. TransformerLens' get_act_patch_direct_path ends at q, k and v
        of later heads, so this is its activation patching with everything else frozen.

    Differs:
        MLPs are frozen by default. Effects are divided by the mean difference of the pairs that count, where the
        authors' code divides within each batch and averages. Pairs without the behaviour are left out.

    Limits:
        Does not show what a head does through later heads. The final norm mixes effects, so they need not add up.
        Intervals take the mean difference as known.
    """
    if mlps not in ("frozen", "live"):
        raise UsageError(
            f"unknown mlps {mlps!r}; choose from 'frozen' (the path to the logits alone), 'live' (later MLPs respond)."
        )
    frozen = ("attn.hook_z",) if mlps == "live" else ("attn.hook_z", "hook_mlp_out")
    name, measure = "path_patching", partial(patched, metric, frozen, batch_size)
    return effects(
        name,
        model,
        clean,
        corrupt,
        metric,
        measure,
        direction,
        normalize,
        batch_size,
        seed,
        folder,
        progress,
        mlps=mlps,
    )
