"""ITI: offsets along the directions in which probes tell true from false."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.steer.offset import Offset
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import z


class Iti(NamedTuple):
    """The edit, and how well a probe on each head did on prompts that it had not seen."""

    edit: Offset
    scores: HeadScores


def iti(
    model: nn.Module,
    prompts: Prompts,
    labels: Sequence[Any],
    *,
    k: int = 48,
    alpha: float = 15.0,
    direction: str = "mass-mean",
    folds: int = 5,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Iti:
    """Inference-time intervention: the top k heads by probe are moved by alpha sigma theta, at the last position.

    z[n l h d] is what a head writes at the last token of prompt n. score[n l h] = 1 where a logistic probe of the head,
    fitted on the other folds, gives prompt n its label: the mean is the held-out accuracy. theta[l h d] =
    mean of z where true - mean where false, to length one ("probe": the weights of a probe on all prompts);
    sigma[l h] = deviation of z theta over all prompts; Offset(alpha sigma theta, at="last").
    prompts: answered questions, ending where the answer does; labels: true or false for each. k 48 and alpha 15 for
    LLaMA-7B in the paper; each class needs a prompt for each fold.
    Prompts that share a question should not be split between folds; here they may be, so give one of each.
    Source: Li et al. 2306.03341. Differs: each prompt is held out once, in stratified folds, where the paper holds out
    one fifth; the directions are those of all prompts.
    Cannot show: that the model uses what probes read; compare with random heads. The best of many probes look better
    than they are: judge the edit on prompts that are not among these.
    """
    if direction not in ("mass-mean", "probe"):
        raise UsageError(f"direction={direction!r} is none: take 'mass-mean' or 'probe'.")
    layout = HeadLayout.of(model)
    if not 1 <= k <= layout.size:
        raise UsageError(f"k={k} heads of {layout.size}: give a number from 1 to that.")
    true = _classes(labels, len(prompts), folds)
    title = "iti" if progress else None
    # "generated" begins at the row that makes the first new token, the last of each prompt
    parts = [
        cap[z()][:, :, :, 0]
        for _, cap in read(model, prompts, z(), batch_size=batch_size, queries="generated", progress=title)
    ]
    written = torch.cat(parts).float()
    right, weights = probed(written, true, folds, seed, progress)
    scores = HeadScores(
        name="iti",
        per_prompt=right,
        unit="held-out accuracy",
        kv_heads=layout.kv_heads,
        settings={"k": k, "alpha": alpha, "direction": direction, "folds": folds},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        seed=seed,
        labels=tuple("true" if label else "false" for label in true.tolist()),
    )
    theta = written[true].mean(0) - written[~true].mean(0) if direction == "mass-mean" else weights
    theta = torch.nn.functional.normalize(theta, dim=-1)
    sigma = torch.einsum("nlhd,lhd->nlh", written, theta).std(0, correction=0)
    move = alpha * sigma[..., None] * theta
    return Iti(Offset({str(head): move[head] for head in scores.top(k)}, at="last"), scores)


def probed(
    written: Float[Tensor, "n l h d"], true: Bool[Tensor, "n"], folds: int, seed: int, progress: bool = False
) -> tuple[Float[Tensor, "n l h"], Float[Tensor, "l h d"]]:
    """Whether a probe that did not see prompt n gives it its label, and the weights of a probe that saw all."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    labels = true.numpy()
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels))
    right, weights = torch.zeros(written.shape[:3]), torch.zeros(written.shape[1:])
    heads = [(layer, head) for layer in range(written.shape[1]) for head in range(written.shape[2])]
    for layer, head in tqdm(heads, desc="probes", disable=not progress, delay=2, leave=False):
        x = written[:, layer, head].double().numpy()
        for train, test in splits:
            probe = LogisticRegression(max_iter=1000).fit(x[train], labels[train])
            right[test, layer, head] = torch.from_numpy(probe.predict(x[test]) == labels[test]).float()
        weights[layer, head] = torch.from_numpy(LogisticRegression(max_iter=1000).fit(x, labels).coef_[0]).float()
    return right, weights


def _classes(labels: Sequence[Any], prompts: int, folds: int) -> Tensor:
    """Bool [n]. Raises UsageError for labels that no probe can be fitted and tested on."""
    given = list(labels)
    if len(given) != prompts or any(label not in (0, 1) for label in given):
        raise UsageError(f"{len(given)} labels for {prompts} prompts: give true or false for each.")
    true = torch.tensor([bool(label) for label in given])
    fewest = min(int(true.sum()), int((~true).sum()))
    if not 2 <= folds <= fewest:
        raise UsageError(
            f"{folds} folds of {int(true.sum())} true and {int((~true).sum())} false prompts: take at least 2 folds, "
            "and as many prompts of each label."
        )
    return true
