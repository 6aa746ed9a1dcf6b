"""Detectors on replies: decoding while something is kept of each step, and which replies count."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.tasks.needle import rouge1_recall
from interp.errors import SpanError
from interp.hooks.generate import Reply, generate
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import Capture, capture
from interp.hooks.read.keep import Keep


def decoded(
    model: nn.Module,
    prompts: Prompts,
    keep: Any,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
) -> Iterator[tuple[Prompts, Capture, list[Reply]]]:
    """Decode greedy replies up to a newline, and yield each batch, what was kept of its replies, and the replies.

    Row t of a result belongs to the query that gave token t of the reply.

    Args:
        model: A transformers causal language model.
        prompts: Prompts to reply to.
        keep: What `capture` keeps, or a function of the batch that gives it.
        max_new_tokens: Number of new tokens of a reply, at most.
        batch_size: Number of prompts per forward pass.
        progress: Title of a progress bar; None for no bar.
    """
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, delay=2, leave=False)
    for batch in prompts.batches(batch_size):
        wanted: Any = keep(batch) if callable(keep) and not isinstance(keep, Keep) else keep
        with capture(model, wanted, batch, queries="generated") as cap:
            replies = generate(model, batch, max_new_tokens=max_new_tokens, stop="\n")
        yield batch, cap, replies
        bar.update(len(batch))
    bar.close()


def counted(
    prompts: Prompts, replies: list[Reply], recall: float | None, score: Callable[[int, Prompt, Reply], Tensor]
) -> list[Tensor]:
    """`score(b, prompt, reply)`, Float [l h], of each prompt; NaN where the reply does not contain the answer."""
    found = []
    for b, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        value = score(b, prompt, reply).float()
        right = recall is None or recalled(prompt, reply, recall)
        found.append(value if right else torch.full_like(value, torch.nan))
    return found


def recalled(prompt: Prompt, reply: Reply, recall: float) -> bool:
    """Whether ROUGE-1 recall of the answer in the reply is above `recall`; of token ids where there is no text."""
    text: Any = prompt.meta.get("answer")
    if text and reply.text:
        return rouge1_recall(text, reply.text) > recall
    wanted = set(answer(prompt))
    return len(wanted & set(reply.ids)) / len(wanted) > recall


def answer(prompt: Prompt) -> tuple[int, ...]:
    """Token ids of the answer, as they occur in the context."""
    start, stop = prompt.spans["answer"][0]
    return prompt.ids[start:stop]


def one_place(prompts: Prompts, span: str = "answer") -> None:
    """Raise SpanError for a prompt in which the span occurs nowhere, or in several places."""
    for number, spans in enumerate(prompts.span(span)):
        if len(spans) != 1:
            raise SpanError(
                f"prompt {number} has its {span} in {len(spans)} places; mark the one that it is copied from."
            )
