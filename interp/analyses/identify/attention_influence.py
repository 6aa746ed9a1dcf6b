"""AttentionInfluence: how much worse a model predicts a document when its retrieval heads are ablated."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.causal.ablated_measures import source_of_numbers
from interp.analyses.causal.random_sets import Condition, RandomSets, excluded
from interp.analyses.causal.shared_forwards import SharedForwards
from interp.analyses.measures.losses import token_losses
from interp.analyses.registry import analysis
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.set_test import N_RANDOM_SETS
from interp.analyses.results.trial import BASELINE, RANDOM_BY_LAYER, Trial
from interp.analyses.results.trials import Trials
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind, ablate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

HEADS = "heads"
"""condition of the ablated retrieval heads"""


def _inputs(run: Any) -> dict[str, Any]:
    """The heads that the user named, otherwise the scores of retrieval."""
    return {"heads": run.heads if len(run.heads) else run.scores["retrieval"], "n_random_sets": run.n_random_sets}


@analysis(
    title="AttentionInfluence", group="long context", order=31, prompts=standard.passages, joint=True, resumable=True,
    needs=("retrieval",), named_heads=True, inputs=_inputs, in_all=False,
    source_settings={"share": 0.05},
)  # fmt: skip
def attention_influence(
    model: nn.Module,
    documents: Prompts | Sequence[str],
    heads: HeadScores | Any,
    *,
    share: float = 0.05,
    ablation: AblationKind = "uniform",
    reference: Prompts | None = None,
    tokenizer: Any = None,
    n_random_sets: int = N_RANDOM_SETS,
    batch_size: int = 8,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> Trials:
    """Measure the influence of heads on documents: the relative rise of a document's loss with the heads ablated.

    `AI[p] = (ablated[p] - baseline[p]) / baseline[p]`, where both are the mean next-token cross-entropy of document p.
    The same number for random heads, drawn from all layers and matched by layer, is the control, see `Trials.set_test`.
    Sort the values to rank documents by how much they depend on the heads.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        documents: Prompts, or texts with a `tokenizer`.
        heads: Head scores such as those of `retrieval`, of which the top `share` of all heads is taken, or anything
            that `HeadSet.parse` takes.
        share: Share of all heads; heads without a score above 0 are never taken.
        ablation: "uniform" gives all visible keys the same weight; see `ablate` for the others.
        reference: Prompts that the ablations "mean" and "resample" take values from.
        tokenizer: Tokenizer of the texts.
        n_random_sets: Number of random sets that are matched by layer; a verdict needs at least 39.
        batch_size: Number of documents per forward pass.
        seed: Seed of the random heads, of "resample" and of the confidence intervals.
        folder: Where finished conditions are kept, so that an interrupted analysis continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        Trials: The measures "influence" (a share of the baseline loss) and "loss" (nats per token) under "heads",
        "random" and "random by layer"; the influence of "baseline" is 0.

    Raises:
        UsageError: If documents are texts and there is no tokenizer, or there are no heads.
        PromptError: If a document has one token or is longer than the context.
        HeadError: If too few heads are left to draw from.

    Examples:
        >>> found = interp.identify.attention_influence(model, prompts, "L1H2", n_random_sets=1)
        >>> found.conditions
        ('heads', 'random', 'random by layer', 'baseline')

    Source:
        AttentionInfluence, 2505.07293, Eq. 5, with the top 5 % of heads by `retrieval` on a small model.

    Differs:
        The ablation of the paper is described in an appendix that was not available, so equal weights are our reading
        of it. Random heads are added.

    Limits:
        Does not measure quality. Values compare only within one domain (general, math, code). Repetitive text inflates
        them, so remove duplicates first. A document that the model predicts well has a small baseline, so a small rise
        gives it a large value.
    """
    if not isinstance(documents, Prompts):
        if tokenizer is None:
            raise UsageError("documents are texts and there is no tokenizer; pass tokenizer=, or give prompts.")
        documents = Prompts.encode(tokenizer, documents)
    layout = HeadLayout.of(model)
    if not 0 < share <= 1:
        raise UsageError(f"share={share} is no share of all heads; give a number above 0 and at most 1.")
    if isinstance(heads, HeadScores):
        chosen = heads.heads(top=max(1, round(share * layout.size)), above=0.0)
    else:
        chosen = HeadSet.parse(heads, layout)
    other = excluded(heads, chosen) if isinstance(heads, HeadScores) else HeadSet(())
    shared = SharedForwards.of(model, [chosen])
    sets = RandomSets(chosen, layout, n_random_sets, seed, HEADS, other)
    source = Provenance.of(model, documents.tokenizer, seed=seed)
    referred = None if reference is None else [reference.fingerprint(), seed]
    parts = Parts.of(folder, "influence", [*source_of_numbers(source), ablation, documents.fingerprint(), referred])

    def losses(heads: HeadSet) -> Float[Tensor, "p"]:
        passes = shared.resume(heads) if len(heads) else shared.record()
        with ablate(model, heads, ablation, reference=reference, seed=seed), passes:
            return token_losses(model, documents, batch_size)

    bar = tqdm(desc="attention influence", unit="head set", disable=not progress, delay=2, leave=False)

    def losses_of(heads: HeadSet) -> Tensor:
        bar.update()
        return parts.get(str(heads), lambda: {"loss": losses(heads)})["loss"]

    def trial(condition: Condition) -> Trial:
        loss = losses_of(condition.heads)
        return Trial(
            condition=condition.name,
            values={"influence": tuple(((loss - base) / base).tolist()), "loss": tuple(loss.tolist())},
            heads=condition.heads,
            size=len(condition.heads),
            draw=condition.draw,
            facts=condition.facts,
        )

    with bar:
        base = losses_of(HeadSet(()))
        unmodified = Trial(BASELINE, {"influence": (0.0,) * len(base), "loss": tuple(base.tolist())})
        own = trial(Condition(HEADS, chosen))
        trials = [own, *sets.run(trial, unmodified, own), unmodified]
    return Trials(
        name="attention_influence",
        trials=tuple(trials),
        intervention=ablation,
        title="AttentionInfluence",
        shares=("influence",),
        control=RANDOM_BY_LAYER,
        claim="larger effect",
        n_random_sets=n_random_sets,
        units={"loss": "nats per token"},
        questions=tuple(str(prompt.meta.get("id", number)) for number, prompt in enumerate(documents)),
        seed=seed,
        settings={
            "share": share, "ablation": ablation, "n_random_sets": n_random_sets, "prompts": documents.fingerprint()
        },
        provenance=source,
    )  # fmt: skip
