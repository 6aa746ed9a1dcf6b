"""Retrieval-reasoning heads: heads whose largest attention lies on the answer while the model replies."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses import costs
from interp.analyses.identify._replies import answer, counted, decoded, one_place
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.reply_limit import AT_LIMIT, at_limit
from interp.analyses.tasks import standard
from interp.hooks.generate import Reply
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.keep import TopKeys, top_keys

MAX_KEYS = 64
"""largest number of keys that `top_keys` gives"""


def _kept(prompts: Prompts, settings: Mapping[str, Any]) -> tuple[TopKeys]:
    """Keeps of a batch, from which its cost follows."""
    return (top_keys(max(_keys(prompt, settings.get("span", "answer")) for prompt in prompts)),)


@analysis(
    title="Retrieval reasoning",
    group="long context",
    order=10,
    sets=("long",),
    prompts=standard.inferred_needles,
    check=one_place,
    max_new_tokens="reply_tokens",
    run_settings={"max_new_tokens": "$reply_tokens"},
    cost=costs.decoding(_kept, max_new_tokens=REPLY_TOKENS),
    source_settings={
        "span": "sentence of the answer",
        "recall": "F1 above 0.5",
        "max_new_tokens": "tokens of the answer, at most 50",
        "needle_length": "up to 10,000",
    },
    control_extras={"distractor": "On distractors"},
)
def retrieval_reasoning(
    model: nn.Module,
    prompts: Prompts,
    *,
    span: str = "answer",
    recall: float = 0.5,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by how much of its largest attention lies on the answer while the model replies.

    The model decodes greedily. `score[n l h] = sum over t < answer tokens of (sum over the top K keys k in the span of
    pattern[n l h r_t k]) / span tokens`, where K is the number of span tokens, at most 64, and r_t is the query that
    gives token t. The generated token and the attended token need not be equal.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with a span "answer". `tasks.needle(needles=3, kind="inferred")` asks for a fact in other words
            among distractors.
        span: Span on which attention counts.
        recall: A prompt counts where the reply contains more than this share of the words of the answer (ROUGE-1
            recall); otherwise its scores are NaN.
        max_new_tokens: Number of new tokens of a reply, at most.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in attention per answer token; NaN where the prompt does not count,
            or the window of a layer hides the span from every query of the reply. The extra "distractor" is the same
            for the tokens of the prompt's span "distractor", NaN without one; a head that distinguishes the right fact
            from others scores low there. The extra "at_limit" marks the replies that ended at `max_new_tokens`.

    Raises:
        SpanError: If a prompt has no such span or no "answer", or has it in several places.

    Examples:
        >>> item = {"text": "The code is 4711. Which code? It is", "spans": {"answer": "4711"}}
        >>> needles = interp.Prompts.encode(tokenizer, [item])
        >>> scores = interp.identify.retrieval_reasoning(model, needles, max_new_tokens=4)
        >>> scores.per_prompt.shape
        torch.Size([1, 2, 4])

    Source:
        HeadKV-R2, Fu et al. (ICLR 2025), by the released code: attention on the span without a comparison of tokens, as
        many steps as the answer has tokens, and K the number of span tokens.

    Differs:
        The code marks the whole sentence of the answer, where the span is the answer here, and takes all K of a long
        span. It counts a prompt by a QA F1 score above 0.5 in place of ROUGE-1 recall, and ends a reply after as many
        tokens as the answer has. Its needle is one passage of the answer, a distractor and the facts that decide
        between them; the question here uses other words than the needle. The reply is prefilled: `tasks.needle` ends
        with the first words of the answer's sentence and uses the chat template, whereas the code ends with "Answer:"
        and uses none.

    Limits:
        Does not show that the head reasons; only attention on the answer is measured. Where answers are short, it ranks
        heads as `semantic_retrieval` does: on the demo model the two correlate at .99.
    """
    one_place(prompts)
    one_place(prompts, span)
    parts, others = [], []
    ended: list[bool] = []
    made: list[TopKeys] = []

    def keep(batch: Prompts) -> TopKeys:
        made.append(top_keys(max(_keys(prompt, span) for prompt in batch)))
        return made[-1]

    title = "retrieval_reasoning" if progress else None
    both = (span, "distractor")
    steps = decoded(
        model, prompts, keep, spans=both, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=title
    )
    for batch, cap, replies, seen in steps:
        top = cap[made.pop()]

        def inside(b: int, prompt: Prompt, reply: Reply, where: str, top: tuple[Tensor, Tensor] = top) -> Tensor:
            # [l h t k]: the first keys are the largest
            rows = slice(min(len(reply.ids), len(answer(prompt))))
            keys, probs = (part[b, :, :, rows, : _keys(prompt, span)] for part in top)
            ranges = prompt.spans.get(where, ())
            here = torch.stack([(keys >= start) & (keys < stop) for start, stop in ranges] or [keys < -1]).any(0)
            tokens = sum(stop - start for start, stop in ranges)
            return (probs * here).sum((-1, -2)) / (tokens or torch.nan)

        parts += counted(batch, replies, recall, lambda *row, f=inside: f(*row, span), seen[span])
        others += counted(batch, replies, recall, lambda *row, f=inside: f(*row, "distractor"), seen["distractor"])
        ended += [reply.at_limit for reply in replies]
    found = torch.stack(parts)
    return HeadScores(
        name="retrieval_reasoning",
        per_prompt=found,
        unit="attention per answer token",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"span": span, "recall": recall, "max_new_tokens": max_new_tokens},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={"distractor": torch.stack(others), AT_LIMIT: at_limit(ended, found)},
        seed=seed,
        labels=tuple(str(prompt.meta.get("key", "")) for prompt in prompts),
    )


def _keys(prompt: Prompt, span: str) -> int:
    """Number of top keys that are looked at for a prompt."""
    start, stop = prompt.spans[span][0]
    return min(stop - start, MAX_KEYS)
