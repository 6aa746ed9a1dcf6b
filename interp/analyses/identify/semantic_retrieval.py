"""Semantic retrieval heads: heads that attend to the whole answer in the context while the model generates it."""

import torch
from torch import Tensor, nn

from interp.analyses import costs
from interp.analyses.identify._replies import counted, decoded, one_place
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.reply_limit import AT_LIMIT, at_limit
from interp.analyses.tasks import standard
from interp.hooks.generate import Reply
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.keep import mass


@analysis(
    title="Semantic retrieval",
    group="long context",
    order=9,
    sets=("long",),
    prompts=standard.needles,
    check=one_place,
    max_new_tokens="reply_tokens",
    run_settings={"max_new_tokens": "$reply_tokens"},
    cost=costs.decoding(mass("answer"), max_new_tokens=REPLY_TOKENS),
    source_settings={"span": "needle", "recall": 0.5, "needle_length": "1,000 to 50,000"},
)
def semantic_retrieval(
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
    """Score each head by its attention on the whole answer at the steps that generate one of its tokens.

    The model decodes greedily. `score[n l h] = sum over t of count[w_t] * (sum over k in span of pattern[n l h r_t
    k])`, where r_t is the query whose logits give token w_t, and count[w] is the number of times that w occurs in the
    span.

    The score is not divided by the span's length, so use it to rank heads, without a threshold.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with a span "answer", such as `tasks.needle`.
        span: Span whose attention is summed; "needle" takes the sentence that holds the answer.
        recall: A prompt counts where the reply contains more than this share of the words of the answer (ROUGE-1
            recall); otherwise its scores are NaN.
        max_new_tokens: Number of new tokens of a reply, at most.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in attention on the answer, summed over copied tokens. NaN where the
            prompt does not count, or where the window of a layer hides the span from every query of the reply. The
            extra "at_limit" marks the replies that ended at `max_new_tokens`.

    Raises:
        SpanError: If a prompt has no such span or no "answer", or has it in several places.

    Examples:
        >>> item = {"text": "The code is 4711. Which code? It is", "spans": {"answer": "4711"}}
        >>> needles = interp.Prompts.encode(tokenizer, [item])
        >>> scores = interp.identify.semantic_retrieval(model, needles, max_new_tokens=4)
        >>> scores.per_prompt.shape
        torch.Size([1, 2, 4])

    Source:
        CompressKV 2508.02401, as in its released code, which counts attention to the whole needle.

    Differs:
        The span is located by exact character offsets. The default span is the answer itself, as in `retrieval`. The
        reply is prefilled: `tasks.needle` ends with the first words of the answer's sentence. Decoding stops at a
        newline or the end token.

    Limits:
        Does not show which token of the answer is read. Does not show that the model needs the head; run an ablation
        test for that.
    """
    one_place(prompts)
    one_place(prompts, span)
    keep, parts = mass(span), []
    ended: list[bool] = []
    title = "semantic_retrieval" if progress else None
    steps = decoded(
        model, prompts, keep, spans=(span,), max_new_tokens=max_new_tokens, batch_size=batch_size, progress=title
    )
    for batch, cap, replies, seen in steps:
        share = cap[keep][..., 0]

        def score(b: int, prompt: Prompt, reply: Reply, share: Tensor = share) -> Tensor:
            inside = prompt.ids[slice(*prompt.spans[span][0])]
            times = torch.tensor([float(inside.count(token)) for token in reply.ids])
            return (share[b, :, :, : len(reply.ids)] * times).sum(-1)

        parts += counted(batch, replies, recall, score, seen[span])
        ended += [reply.at_limit for reply in replies]
    found = torch.stack(parts)
    return HeadScores(
        name="semantic_retrieval",
        per_prompt=found,
        unit="attention on the answer, summed over copied tokens",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"span": span, "recall": recall, "max_new_tokens": max_new_tokens},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={AT_LIMIT: at_limit(ended, found)},
        seed=seed,
        labels=tuple(str(prompt.meta.get("key", "")) for prompt in prompts),
    )
