"""Retrieval heads: heads that copy the answer from a long context while the model decodes it."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.scores import HeadScores
from interp.analyses.tasks.generate import Reply, generate
from interp.analyses.tasks.needle import rouge1_recall
from interp.hooks.capture import Capture, capture, read
from interp.hooks.heads import HeadLayout
from interp.hooks.keep import top_keys
from interp.hooks.prompts import Prompt, Prompts
from interp.hooks.provenance import Provenance
from interp.kernels.errors import SpanError, UsageError

TOP = top_keys(1)
REPLY = 32
"""new tokens that a reply may take"""


def retrieval(
    model: nn.Module,
    prompts: Prompts,
    *,
    form: Literal["decode", "forced"] = "decode",
    count: Literal["steps", "set"] = "steps",
    threshold: float = 0.1,
    recall: float = 0.5,
    max_new_tokens: int = REPLY,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Retrieval score: how often a head's most attended key is the very answer token that the model writes.

    The model decodes greedily; hit[n l h t] = 1 where argmax over k of pattern[n l h r_t k], r_t the query whose logits
    give token w_t, lies in the prompt's span "answer" and holds w_t. score[n l h] = sum over t of hit / answer tokens.
    count "steps" counts each step (the authors' code; can exceed 1), "set" each answer token once (the paper's Eq. 1).
    form "decode" is the method; "forced" appends the answer's own tokens and reads all steps in one forward: a variant,
    equal where greedy decoding gives these tokens. A prompt counts (else NaN) where ROUGE-1 recall of the answer in the
    reply is above `recall`; forced counts all. `scores.frequency` is the activation frequency. Above `threshold` a head
    is called a retrieval head. prompts: tasks.needle, or any with a span "answer".
    Raises SpanError for a prompt without the span: it never becomes a zero.
    Source: Wu et al. 2404.15574, section 2; threshold 0.1, 50 new tokens, stop at a newline. Differs: spans by exact
    character offsets; chat template where the tokenizer has one.
    Cannot show: that the head is needed (run the causal check), nor heads that retrieve without copying words.
    """
    if form not in ("decode", "forced") or count not in ("steps", "set"):
        raise UsageError(f"form={form!r}, count={count!r}: form is 'decode' or 'forced', count is 'steps' or 'set'.")
    for number, spans in enumerate(prompts.span("answer")):
        if len(spans) != 1:
            raise SpanError(
                f"prompt {number} has its answer in {len(spans)} places: name the one that it is copied from."
            )
    parts = []
    if form == "decode":
        bar = tqdm(total=len(prompts), desc="retrieval", disable=not progress, delay=2, leave=False)
        for batch in prompts.batches(batch_size):
            with capture(model, TOP, batch, queries="generated") as cap:
                replies = generate(model, batch, max_new_tokens=max_new_tokens, stop="\n")
            parts += _hits(batch, cap, replies, count, recall)
            bar.update(len(batch))
        bar.close()
    else:
        longer = replace(prompts, items=tuple(_with_answer(prompt) for prompt in prompts))
        chosen = read(
            model,
            longer,
            TOP,
            batch_size=batch_size,
            queries="forced",
            progress="retrieval" if progress else None,
        )
        for batch, cap in chosen:
            parts += _hits(batch, cap, [Reply(answer(prompt), "") for prompt in batch], count, None)
    return HeadScores(
        name="retrieval" if form == "decode" else "retrieval_forced",
        per_prompt=torch.stack(parts),
        unit="copied tokens per answer token",
        kv_heads=HeadLayout.of(model).kv_heads,
        threshold=threshold,
        settings={"form": form, "count": count, "recall": recall, "max_new_tokens": max_new_tokens},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        seed=seed,
        labels=tuple(str(prompt.meta.get("key", "")) for prompt in prompts),
    )


def answer(prompt: Prompt) -> tuple[int, ...]:
    """The answer's token ids as they stand in the context."""
    start, stop = prompt.spans["answer"][0]
    return prompt.ids[start:stop]


def _with_answer(prompt: Prompt) -> Prompt:
    # the last answer token is predicted, never a query
    ids = prompt.ids + answer(prompt)[:-1]
    return replace(prompt, ids=ids, spans={**prompt.spans, "forced": ((len(prompt.ids) - 1, len(ids)),)})


def _hits(batch: Prompts, cap: Capture, replies: list[Reply], count: str, recall: float | None) -> list[Tensor]:
    keys = cap[TOP].keys[..., 0]
    found = []
    for b, (prompt, reply) in enumerate(zip(batch, replies, strict=True)):
        start, stop = prompt.spans["answer"][0]
        best = keys[b, :, :, : len(reply.ids)]
        here = (best >= start) & (best < stop)
        ids = torch.tensor(prompt.ids)[best.clamp(0, len(prompt.ids) - 1)]
        hit = here & (ids == torch.tensor(reply.ids, dtype=torch.int64))
        length = stop - start
        if count == "set":
            # one place for each distinct answer token that was pasted
            wanted = torch.tensor(sorted(set(answer(prompt))))
            pasted = (hit[..., None] & (ids[..., None] == wanted)).any(-2)
            score = pasted.sum(-1) / len(wanted)
        else:
            score = hit.sum(-1) / length
        if recall is not None and not _recalled(prompt, reply, recall):
            score = torch.full_like(score, torch.nan)
        found.append(score.float())
    return found


def _recalled(prompt: Prompt, reply: Reply, recall: float) -> bool:
    text: Any = prompt.meta.get("answer")
    if text and reply.text:
        return rouge1_recall(text, reply.text) > recall
    wanted = set(answer(prompt))
    return len(wanted & set(reply.ids)) / len(wanted) > recall
