"""Semantic retrieval heads: heads that rest on the whole answer in the context while the model writes its tokens."""

import torch
from torch import Tensor, nn

from interp.analyses.identify._replies import REPLY, counted, decoded, one_place
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.generate import Reply
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.keep import mass


def semantic_retrieval(
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
    """Semantic retrieval score: attention on the whole answer at the steps that write one of its tokens.

    The model decodes greedily. score[n l h] = sum over t of count[w_t] * (sum over k in span of pattern[n l h r_t k]),
    r_t the query whose logits give token w_t, count[w] how often w stands in the span. It is not divided by the span's
    length, so rank heads by it and set no threshold. A prompt counts (else NaN) where ROUGE-1 recall of the answer in
    the reply is above `recall`. prompts: tasks.needle, or any with a span "answer"; span="needle" takes its sentence.
    Raises SpanError for a prompt without the span, or with several.
    Source: CompressKV 2508.02401, by the released code, whose span is the needle. Differs: spans by exact character
    offsets; the answer's own span by default, as in `retrieval`; stop at a newline or the end token.
    Cannot show: which token of the answer is read, nor that the head is needed (run the causal check).
    """
    one_place(prompts)
    one_place(prompts, span)
    keep, parts = mass(span), []
    title = "semantic_retrieval" if progress else None
    steps = decoded(model, prompts, keep, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=title)
    for batch, cap, replies in steps:
        share = cap[keep][..., 0]

        def score(b: int, prompt: Prompt, reply: Reply, share: Tensor = share) -> Tensor:
            inside = prompt.ids[slice(*prompt.spans[span][0])]
            times = torch.tensor([float(inside.count(token)) for token in reply.ids])
            return (share[b, :, :, : len(reply.ids)] * times).sum(-1)

        parts += counted(batch, replies, recall, score)
    return HeadScores(
        name="semantic_retrieval",
        per_prompt=torch.stack(parts),
        unit="attention on the answer, summed over copied tokens",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"span": span, "recall": recall, "max_new_tokens": max_new_tokens},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        seed=seed,
        labels=tuple(str(prompt.meta.get("key", "")) for prompt in prompts),
    )
