"""AttentionInfluence: how much worse a model predicts a document when its retrieval heads are ablated."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.causal.ablation_test import TOP, conditions, source_of_numbers
from interp.analyses.measures.losses import token_losses
from interp.analyses.registry import analysis
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trial import BASELINE, Trial
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
    needs=("retrieval",), named_heads=True, inputs=_inputs, in_every=False,
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
    n_random_sets: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> Trials:
    """Measure the influence of heads on documents: the relative rise of a document's loss with the heads ablated.

    `AI[p] = (ablated[p] - baseline[p]) / baseline[p]`, where both are the mean next-token cross-entropy of document p.
    The same number for random heads, drawn freely and matched by layer, is the control. Sort the values to rank
    documents by how much they depend on the heads.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        documents: Prompts, or texts with a `tokenizer`.
        heads: Head scores such as those of `retrieval`, of which the top `share` of all heads is taken, or anything
            that `HeadSet.parse` takes.
        share: Share of all heads; heads without a score above 0 are never taken.
        ablation: "uniform" gives all visible keys the same weight; see `ablate` for the others.
        reference: Prompts that the ablations "mean" and "resample" take values from.
        tokenizer: Tokenizer of the texts.
        n_random_sets: Number of random sets of each kind.
        batch_size: Number of documents per forward pass.
        seed: Seed of the random heads, of "resample" and of the intervals.
        folder: Where finished conditions are kept, so that an interrupted analysis continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        Trials: The measures "influence" (a share of the baseline loss) and "loss" (nats per token) under "heads",
        "random" and "random by layer"; "baseline" has the loss only.

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
    source = Provenance.of(model, documents.tokenizer, seed=seed)
    referred = None if reference is None else [reference.fingerprint(), seed]
    parts = Parts.of(folder, "influence", [*source_of_numbers(source), ablation, documents.fingerprint(), referred])

    def losses(heads: HeadSet) -> Float[Tensor, "p"]:
        with ablate(model, heads, ablation, reference=reference, seed=seed):
            return token_losses(model, documents, batch_size)

    found = []
    tested = conditions(chosen, layout, n_random_sets, seed)
    for condition in tqdm(tested, desc="attention influence", disable=not progress, delay=2, leave=False):
        made = parts.get(str(condition.heads), lambda heads=condition.heads: {"loss": losses(heads)})
        found.append((condition, made["loss"]))
    base = found[0][1]
    trials = [
        Trial(
            condition=HEADS if condition.name == TOP else condition.name,
            values={"influence": tuple(((loss - base) / base).tolist()), "loss": tuple(loss.tolist())},
            heads=condition.heads,
            size=len(condition.heads),
            draw=condition.draw,
        )
        for condition, loss in found[1:]
    ]
    trials.append(Trial(BASELINE, {"loss": tuple(base.tolist())}))
    return Trials(
        name="attention_influence",
        trials=tuple(trials),
        intervention=ablation,
        title="AttentionInfluence",
        shares=("influence",),
        units={"loss": "nats per token"},
        questions=tuple(str(prompt.meta.get("id", number)) for number, prompt in enumerate(documents)),
        seed=seed,
        settings={
            "share": share, "ablation": ablation, "n_random_sets": n_random_sets, "prompts": documents.fingerprint()
        },
        provenance=source,
    )  # fmt: skip
