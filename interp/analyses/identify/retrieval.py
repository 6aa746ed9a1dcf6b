"""Retrieval heads: heads that copy the answer from a long context while the model decodes it."""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from interp.analyses import costs
from interp.analyses.causal import controls
from interp.analyses.identify._replies import MostAttended, answer, counted, decoded, one_place, span_keys
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.reply_limit import AT_LIMIT, at_limit
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.generate import Reply
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import Keep, top_keys
from interp.hooks.read.visibility import Visibility
from interp.hooks.seam import tapping

TOP = top_keys(1)


@analysis(
    title="Retrieval",
    group="long context",
    order=1,
    sets=("basic", "long"),
    color="#d55e00",
    prompts=standard.needles,
    check=one_place,
    max_new_tokens="reply_tokens",
    run_settings={"max_new_tokens": "$reply_tokens"},
    control=controls.answers(),
    cost=costs.decoding(TOP, max_new_tokens=REPLY_TOKENS, forced="answer"),
    source_settings={
        "threshold": 0.1,
        "recall": 0.5,
        "max_new_tokens": 50,
        "form": "decode",
        "count": '"steps" in the code, "set" (each distinct answer token once) in the paper',
        "n_needles": 600,
        "needle_length": "1,000 to 50,000 tokens",
        "needle_depths": "10 depths from 0 to 1",
    },
)
def retrieval(
    model: nn.Module,
    prompts: Prompts,
    *,
    form: Literal["decode", "forced"] = "decode",
    count: Literal["steps", "set"] = "steps",
    by_value: bool = False,
    threshold: float = 0.1,
    recall: float = 0.5,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by the number of tokens that it copies from the answer span of the prompt (the part of the needle
    that answers the question), divided by the number of tokens of that span.
    A step counts for a head where its most attended position lies in that span and holds the same token that is
    generated (Wu et al. call this copying; what the head writes is not examined).
    A prompt is used where the reply contains more than half of the words of the answer.

    The model decodes greedily. Let w_t be the token generated at step t, and r_t the position whose output logits give
    it.
    `hit[n l h t] = 1` where argmax over k of `pattern[n l h r_t k]` lies in the prompt's span "answer" and holds w_t.
    `score[n l h] = sum over t of hit / number of answer tokens`. A head above `threshold` is called a retrieval head.
    `scores.frequency` is the share of prompts in which a head scores above 0.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with a span "answer", such as `tasks.needle`.
        form: "decode" reads the attention while the model generates its reply. "forced" is a cheaper variant: it
            appends the tokens of the answer to the prompt, reads them in one forward pass, and counts every prompt. It
            scores each answer token once. In "decode", a reply that goes on after the answer may copy answer tokens
            again; with `count="steps"` these repeats count too.
        count: "steps" counts each step, as the authors' code does, so that a score can exceed 1. "set" counts each
            distinct answer token once and divides by the number of distinct answer tokens, as in the paper's Eq. 1.
        by_value: Weight each key by the norm of its value vector: the most attended position is the key with the
            largest product of attention and value norm. This needs more memory: for each head it keeps the whole
            attention row of every reply token.
        threshold: Score above which a head is called a retrieval head.
        recall: A prompt is used where the reply contains more than this share of the words of the answer (ROUGE-1
            recall); otherwise its scores are NaN.
        max_new_tokens: Number of new tokens of a reply, at most.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in copied tokens per answer token. NaN where the prompt does not count
            (by default, where the reply contains at most half of the words of the answer), or where the window of a
            layer hides the answer from every query of the reply. The extra "at_limit" marks the replies that ended at
            `max_new_tokens`, except in the form "forced".

    Raises:
        SpanError: If a prompt has no span "answer", or has it in several places; such a prompt is never scored as 0.
        UsageError: If `form` or `count` is unknown.

    Examples:
        >>> item = {"text": "The code is 4711. Which code? It is", "spans": {"answer": "4711"}}
        >>> needles = interp.Prompts.encode(tokenizer, [item])
        >>> scores = interp.identify.retrieval(model, needles, max_new_tokens=4)
        >>> scores.per_prompt.shape
        torch.Size([1, 2, 4])

    Source:
        Wu et al. 2404.15574, section 2. The authors use a threshold of 0.1, at most 50 new tokens, and stop at a
        newline.

    Differs:
        The answer's tokens are located by exact character offsets, whereas the released code searches for similar
        tokens. The prompts of this package (`tasks.needle`: a made-up fact, the needle, hidden in a long text, and a
        question about it) use the chat template of any tokenizer that has one, whereas the released code uses it for
        two models. The prompts of this package end with the first words of the answer's sentence, so that the model
        copies from its first new token on, whereas the prompts of the released code end with the question. By default a
        reply has at most 32 new tokens, not 50; the setting `max_new_tokens` (option `--reply-tokens`) changes this
        limit.

    Limits:
        Does not show that the model needs the head; an ablation test shows that. Does not find heads that retrieve
        without copying words.
    """
    if form not in ("decode", "forced") or count not in ("steps", "set"):
        raise UsageError(
            f"unknown form {form!r} or count {count!r}; form is 'decode' or 'forced', count is 'steps' or 'set'."
        )
    one_place(prompts)
    parts: list[Tensor] = []
    ended: list[bool] = []
    title = "retrieval" if progress else None
    keep = MostAttended(by_value, max_new_tokens)
    if form == "decode":
        steps = decoded(
            model,
            prompts,
            keep,
            spans=("answer",),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=title,
        )
        for batch, cap, replies, seen in steps:
            parts += _hits(batch, keep.keys(cap), replies, count, recall, seen["answer"])
            ended += [reply.at_limit for reply in replies]
    else:
        parts = _forced(model, prompts, keep, count, batch_size, title)
    found = torch.stack(parts)
    return HeadScores(
        name="retrieval" if form == "decode" else "retrieval_forced",
        per_prompt=found,
        unit="copied tokens per answer token",
        kv_heads=HeadLayout.of(model).kv_heads,
        threshold=threshold,
        settings={
            "form": form,
            "count": count,
            "by_value": by_value,
            "recall": recall,
            "max_new_tokens": max_new_tokens,
        },
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={AT_LIMIT: at_limit(ended, found)} if form == "decode" else {},
        seed=seed,
        labels=tuple(str(prompt.meta.get("key", "")) for prompt in prompts),
    )


def _forced(
    model: nn.Module, prompts: Prompts, kept: MostAttended, count: str, batch_size: int, progress: str | None
) -> list[Tensor]:
    """Scores [l h] of each prompt with the answer's own tokens in place of a reply."""
    longer, sight = replace(prompts, items=tuple(_with_answer(prompt) for prompt in prompts)), Visibility()

    def keep(batch: Prompts) -> Keep:
        sight.start(span_keys(batch, "answer", first="forced"))
        return kept(batch)

    parts = []
    with tapping(model, sight):
        for batch, cap in read(model, longer, keep, batch_size=batch_size, queries="forced", progress=progress):
            replies = [Reply(answer(prompt), "") for prompt in batch]
            parts += _hits(batch, kept.keys(cap), replies, count, None, sight.seen.any(-1))
    return parts


def _with_answer(prompt: Prompt) -> Prompt:
    # the last answer token is predicted, never a query
    ids = prompt.ids + answer(prompt)[:-1]
    return replace(prompt, ids=ids, spans={**prompt.spans, "forced": ((len(prompt.ids) - 1, len(ids)),)})


def _hits(
    batch: Prompts,
    keys: Tensor,
    replies: list[Reply],
    count: str,
    recall: float | None,
    seen: Bool[Tensor, "b l h"],
) -> list[Tensor]:
    def score(b: int, prompt: Prompt, reply: Reply) -> Tensor:
        start, stop = prompt.spans["answer"][0]
        best = keys[b, :, :, : len(reply.ids)]
        here = (best >= start) & (best < stop)
        ids = torch.tensor(prompt.ids)[best.clamp(0, len(prompt.ids) - 1)]
        hit = here & (ids == torch.tensor(reply.ids, dtype=torch.int64))
        if count == "steps":
            return hit.sum(-1) / (stop - start)
        # one place for each distinct answer token that was pasted
        wanted = torch.tensor(sorted(set(answer(prompt))))
        pasted = (hit[..., None] & (ids[..., None] == wanted)).any(-2)
        return pasted.sum(-1) / len(wanted)

    return counted(batch, replies, recall, score, seen)
