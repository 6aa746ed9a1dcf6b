"""ITI: offsets along the directions in which probes separate true from false."""

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
    """An edit by `iti`, and the held-out accuracy of the probe of each head."""

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
    """Inference-time intervention: offsets of `alpha sigma theta` at the last position of the k best heads.

    `z[n l h d]` is the output of a head at the last token of prompt n. `score[n l h]` is 1 where a logistic probe of
    the head, fitted on the other folds, predicts the label of prompt n; its mean is the held-out accuracy.

    - `theta[l h d] = mean of z over true prompts - mean of z over false prompts`, of length one,
    - `sigma[l h]`: standard deviation of `z theta` over all prompts,
    - the edit is `Offset(alpha sigma theta, at="last")`.

    Prompts that share a question should not be split between folds, which is not checked here: give one prompt for each
    question.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Answered questions that end where the answer ends.
        labels: True or false for each prompt; each class needs a prompt for each fold.
        k: Number of heads, 48 for LLaMA-7B in the paper.
        alpha: Length of the offsets in deviations, 15 for LLaMA-7B in the paper.
        direction: "mass-mean" for the difference of the class means, "probe" for the weights of a probe on all prompts.
        folds: Number of folds in which probes are tested.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the folds.
        progress: Show a progress bar.

    Returns:
        Iti: the edit, and the held-out accuracy of each head as HeadScores.

    Raises:
        UsageError: If labels, folds or another setting do not fit the prompts.

    Examples:
        >>> labels = [n % 2 for n in range(8)]
        >>> answered = interp.Prompts.from_ids([[5, 6, 7 + label] for label in labels])
        >>> edit, accuracy = interp.steer.iti(model, answered, labels, k=2, folds=2)
        >>> accuracy.per_prompt.shape
        torch.Size([8, 2, 4])

    Source:
        Li et al. 2306.03341.

    Differs:
        Each prompt is held out once, in stratified folds, where the paper holds out one fifth. The directions are those
        of all prompts.

    Limits:
        Does not show that the model uses the information that probes read; compare with random heads. The best of many
        probes look better than they are, so test the edit on other prompts.
    """
    if direction not in ("mass-mean", "probe"):
        raise UsageError(f"unknown direction {direction!r}; choose from 'mass-mean', 'probe'.")
    layout = HeadLayout.of(model)
    if not 1 <= k <= layout.size:
        raise UsageError(f"k={k} is not between 1 and {layout.size}, the number of heads; give such a number.")
    true = _classes(labels, len(prompts), folds)
    title = "iti" if progress else None
    # "generated" begins at the row that makes the first new token, the last of each prompt
    parts = [
        cap[z()][:, :, :, 0]
        for _, cap in read(model, prompts, z(), batch_size=batch_size, queries="generated", progress=title)
    ]
    written = torch.cat(parts).float()
    right, weights = _probed(written, true, folds, seed, progress)
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
    return Iti(Offset({str(head): move[head] for head in scores.top(k, unranked=True)}, at="last"), scores)


def _probed(
    written: Float[Tensor, "n l h d"], true: Bool[Tensor, "n"], folds: int, seed: int, progress: bool = False
) -> tuple[Float[Tensor, "n l h"], Float[Tensor, "l h d"]]:
    """Whether a probe fitted without prompt n predicts its label, and the weights of a probe fitted on all prompts."""
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
    """Labels as Bool `[n]`. Raises UsageError for labels on which no probe can be fitted and tested."""
    given = list(labels)
    if len(given) != prompts or any(label not in (0, 1) for label in given):
        raise UsageError(f"{len(given)} labels for {prompts} prompts; give true or false for each.")
    true = torch.tensor([bool(label) for label in given])
    fewest = min(int(true.sum()), int((~true).sum()))
    if not 2 <= folds <= fewest:
        raise UsageError(
            f"{folds} folds of {int(true.sum())} true and {int((~true).sum())} false prompts cannot be made; use at "
            "least 2 folds, and as many prompts of each label."
        )
    return true
