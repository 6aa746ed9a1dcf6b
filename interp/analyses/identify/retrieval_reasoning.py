"""Retrieval-reasoning heads: heads whose largest attention lies on the answer while the model replies."""

import torch
from torch import Tensor, nn

from interp.analyses.identify._replies import REPLY, answer, counted, decoded, one_place
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.generate import Reply
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.keep import TopKeys, top_keys

MOST = 64
"""keys that top_keys gives"""


def retrieval_reasoning(
    model: nn.Module,
    prompts: Prompts,
    *,
    span: str = "answer",
    recall: float = 0.5,
    max_new_tokens: int = REPLY,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Retrieval-reasoning score: how much of a head's largest attention lies on the answer while the model replies.

    The model decodes greedily. score[n l h] = sum over t < answer tokens of (sum over the top K keys k in the span of
    pattern[n l h r_t k]) / span tokens, with K = span tokens, 64 at most, and r_t the query that gives token t; tokens
    written and copied need not be equal. extras["distractor"]: the same of the same keys inside the prompt's span
    "distractor", over its tokens, NaN without one: a head that tells the right fact from others scores low there.
    A prompt counts (else NaN) where ROUGE-1 recall of the answer in the reply is above `recall`.
    prompts: tasks.needle(needles=3, kind="inferred") asks for a fact in other words among distractors; any with a span
    "answer". Raises SpanError for a prompt without the span, or with several.
    Source: HeadKV-R2, Fu et al. (ICLR 2025), by the released code. Differs: no factor of 10 and no second division by
    the answer's tokens, which only rescale a prompt; the gate is ROUGE-1 recall, not a QA F1; the needles hold no chain
    of facts to reason over.
    Cannot show: that the head reasons; attention on the answer is all that is measured.
    """
    one_place(prompts)
    one_place(prompts, span)
    parts, others = [], []
    made: list[TopKeys] = []

    def keep(batch: Prompts) -> TopKeys:
        made.append(top_keys(max(_keys(prompt, span) for prompt in batch)))
        return made[-1]

    title = "retrieval_reasoning" if progress else None
    steps = decoded(model, prompts, keep, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=title)
    for batch, cap, replies in steps:
        top = cap[made.pop()]

        def inside(b: int, prompt: Prompt, reply: Reply, where: str, top: tuple[Tensor, Tensor] = top) -> Tensor:
            # [l h t k]: the first keys are the largest
            rows = slice(min(len(reply.ids), len(answer(prompt))))
            keys, probs = (part[b, :, :, rows, : _keys(prompt, span)] for part in top)
            ranges = prompt.spans.get(where, ())
            here = torch.stack([(keys >= start) & (keys < stop) for start, stop in ranges] or [keys < -1]).any(0)
            tokens = sum(stop - start for start, stop in ranges)
            return (probs * here).sum((-1, -2)) / (tokens or torch.nan)

        parts += counted(batch, replies, recall, lambda *row, f=inside: f(*row, span))
        others += counted(batch, replies, recall, lambda *row, f=inside: f(*row, "distractor"))
    return HeadScores(
        name="retrieval_reasoning",
        per_prompt=torch.stack(parts),
        unit="attention per answer token",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"span": span, "recall": recall, "max_new_tokens": max_new_tokens},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={"distractor": torch.stack(others)},
        seed=seed,
        labels=tuple(str(prompt.meta.get("key", "")) for prompt in prompts),
    )


def _keys(prompt: Prompt, span: str) -> int:
    start, stop = prompt.spans[span][0]
    return min(stop - start, MOST)
