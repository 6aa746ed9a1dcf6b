"""Attention Tracker: heads that leave the instruction where the data hold an order of their own."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses.identify._detection import Detection
from interp.analyses.identify._last_token import at_last
from interp.analyses.identify._spread import spread
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.keep import mass

SPANS = mass("instruction", "data")
LEAST = 1e-3
"""mass on both spans below which a share of them says nothing"""


def attention_tracker(
    model: nn.Module,
    normal: Prompts,
    attacked: Prompts,
    *,
    k: float = 4.0,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Candidate score: how clearly a head's last token leaves the instruction for the data under an injected order.

    With N the last token, focus f[n l h] = a_I / (a_I + a_D), a_I = sum over k in the span "instruction" of
    pattern[n l h N k], a_D the same on "data". score[n l h] = f_normal - f_attacked - k (std_normal + std_attacked),
    the population std over prompts, a constant of the head: its mean over pairs n is the paper's score, a head above 0
    is important, and intervals are those of the mean at that spread. extras: "normal" and "attacked", f itself.
    normal, attacked: pairs, as of tasks.injection, with both spans. k=0 leaves the difference of means, prompt by
    prompt; tables of other prompts join only then.
    f is NaN where a_I + a_D < 1e-3, and so is a head that less than half of the pairs count for.
    Raises PromptError (no pairs), SpanError (a span is missing), UsageError (k below 0).
    Source: Hung et al. 2411.00348, k 4. Differs: spans by exact character offsets, where the released code counts
    tokens from the ends of known templates; no share is taken of next to nothing, where it adds 1e-8; pairs.
    Cannot show: that attention is what makes the model obey; f falls with the length of the data alone, so look at
    tasks.injection(kind="longer") as well.
    """
    if k < 0:
        raise UsageError(f"k={k}: give how many standard deviations to take off, 0 or more.")
    if len(normal) != len(attacked) or not len(normal):
        raise PromptError(f"{len(normal)} normal and {len(attacked)} attacked prompts: give one of each for a pair.")
    found = {
        name: focus_by_head(model, side, batch_size=batch_size, progress=progress)
        for name, side in (("normal", normal), ("attacked", attacked))
    }
    difference = found["normal"] - found["attacked"]
    counts = ~difference.isnan()
    counts &= 2 * counts.sum(0) >= len(counts)
    apart = sum(spread(side.masked_fill(~counts, torch.nan), 0) for side in found.values())
    about = {"spread_of": [normal.fingerprint(), attacked.fingerprint()]} if k else {}
    return HeadScores(
        name="attention_tracker",
        per_prompt=(difference - k * apart).masked_fill(~counts, torch.nan),
        unit="share of the spans",
        kv_heads=HeadLayout.of(model).kv_heads,
        threshold=0.0,
        settings={"k": k, **about},
        provenance=Provenance.of(model, normal.tokenizer, seed=seed),
        extras=found,
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", "")) for prompt in normal),
    )


def focus_by_head(
    model: nn.Module, prompts: Prompts, *, batch_size: int = 8, progress: bool = False
) -> Float[Tensor, "n l h"]:
    """The share of its attention to both spans that the last token of a prompt keeps on the instruction, by head.

    focus[n l h] = a_I / (a_I + a_D), as for `attention_tracker`; NaN where a_I + a_D < 1e-3. Raises SpanError.
    """
    for span in SPANS.spans:
        prompts.span(str(span))
    both = at_last(model, prompts, SPANS, batch_size=batch_size, progress="attention tracker" if progress else None)
    total = both.sum(-1)
    return (both[..., 0] / total).masked_fill(total < LEAST, torch.nan)


def focus(model: nn.Module, prompts: Prompts, heads: Any, *, batch_size: int = 8) -> Float[Tensor, "n"]:
    """Focus score of a prompt: mean over `heads` of the share that stays on the instruction, in 0..1.

    FS[n] = mean over heads with a share of focus[n l h]; NaN where none has one. Low for a prompt whose data give
    orders. heads: anything HeadSet.parse takes, such as attention_tracker(...).heads(). Raises HeadError, SpanError.
    Source: Hung et al. 2411.00348, which calls an injection at 0.5 or below.
    Cannot show: an injection that the heads do not look at.
    """
    layout = HeadLayout.of(model)
    chosen = HeadSet.parse(heads, layout)
    layout.check(chosen)
    if not len(chosen):
        raise UsageError("no heads given: name at least one, as attention_tracker(...).heads(top=10) does.")
    return focus_by_head(model, prompts, batch_size=batch_size)[:, chosen.mask(layout)].nanmean(-1)


def detect(
    model: nn.Module, heads: Any, normal: Prompts, attacked: Prompts, *, threshold: float = 0.5, batch_size: int = 8
) -> Detection:
    """How well the focus scores of `heads` tell attacked from normal prompts: AUROC, the curve, and one threshold.

    A prompt is flagged where its focus score is at most the threshold. Judge on prompts that the heads were not chosen
    on, once beside normal prompts and once beside tasks.injection(kind="longer"), whose data are as long as the
    attacked ones: what is lost there was length. Raises as `focus`; PromptError where a prompt has no score.
    Source: Hung et al. 2411.00348; roc_auc_score and roc_curve of scikit-learn. Differs: the control of equal length.
    Cannot show: that other heads would not do as well; give scores.random_like(heads) too.
    """
    sides = [focus(model, side, heads, batch_size=batch_size) for side in (normal, attacked)]
    for name, side in zip(("normal", "attacked"), sides, strict=True):
        if side.isnan().any():
            number = int(side.isnan().nonzero()[0])
            raise PromptError(
                f"none of the heads looks at a span of {name} prompt {number}, so it has no score: give other heads."
            )
    return Detection.of(sides[0], sides[1], threshold)
