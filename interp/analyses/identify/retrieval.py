"""Retrieval heads: heads that copy the answer from a long context while the model decodes it."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from interp.analyses.identify._replies import REPLY, answer, counted, decoded, one_place
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.generate import Reply
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import Capture, read
from interp.hooks.read.keep import top_keys

TOP = top_keys(1)


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
    one_place(prompts)
    parts = []
    if form == "decode":
        title = "retrieval" if progress else None
        steps = decoded(model, prompts, TOP, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=title)
        for batch, cap, replies in steps:
            parts += _hits(batch, cap, replies, count, recall)
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


def _with_answer(prompt: Prompt) -> Prompt:
    # the last answer token is predicted, never a query
    ids = prompt.ids + answer(prompt)[:-1]
    return replace(prompt, ids=ids, spans={**prompt.spans, "forced": ((len(prompt.ids) - 1, len(ids)),)})


def _hits(batch: Prompts, cap: Capture, replies: list[Reply], count: str, recall: float | None) -> list[Tensor]:
    keys = cap[TOP].keys[..., 0]

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

    return counted(batch, replies, recall, score)
