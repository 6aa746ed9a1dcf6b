"""Detectors on replies: decoding while something is kept of each step, and which replies count."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.tasks.needle import rouge1_recall
from interp.errors import SpanError
from interp.hooks.generate import Reply, generate
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import Capture, capture
from interp.hooks.read.keep import Keep, at, top_keys
from interp.hooks.read.visibility import KeysOf, Visibility, keys_from
from interp.hooks.seam import tapping


class MostAttended:
    """Keeps the most attended key of each query, by attention alone or weighted by the norms of the values."""

    def __init__(self, by_value: bool, max_new_tokens: int) -> None:
        """Choose the weights.

        Args:
            by_value: Whether keys are weighted by the norms of their values.
            max_new_tokens: Number of tokens that may follow the prompts.
        """
        self.by_value, self.max_new_tokens = by_value, max_new_tokens
        self._kept: Keep = top_keys(1)

    def __call__(self, batch: Prompts) -> Keep:
        """The keep of a batch."""
        if self.by_value:
            width = max(batch.lengths) + self.max_new_tokens
            self._kept = at(keys=torch.arange(width).expand(len(batch), width, width), by_value=True)
        return self._kept

    def keys(self, cap: Capture) -> Int[Tensor, "b l h q"]:
        """The keys, -1 for none."""
        if not self.by_value:
            return cap[self._kept].keys[..., 0]
        most, keys = cap[self._kept].max(-1)
        return keys.where(most > 0, -1)


def decoded(
    model: nn.Module,
    prompts: Prompts,
    keep: Any,
    *,
    spans: tuple[str, ...],
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
) -> Iterator[tuple[Prompts, Capture, list[Reply], Mapping[str, Bool[Tensor, "b l h"]]]]:
    """Decode greedy replies up to a newline, and yield each batch, what was kept of its replies, and the replies.

    Row t of a result belongs to the query that gave token t of the reply. Last comes, for each span, whether a head
    can see any of it from a query of the reply.

    Args:
        model: A transformers causal language model.
        prompts: Prompts to reply to.
        keep: What `capture` keeps, or a function of the batch that gives it.
        spans: Spans of the prompts that count.
        max_new_tokens: Number of new tokens of a reply, at most.
        batch_size: Number of prompts per forward pass.
        progress: Title of a progress bar; None for no bar.
    """
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, delay=2, leave=False)
    for batch in prompts.batches(batch_size):
        wanted: Any = keep(batch) if callable(keep) and not isinstance(keep, Keep) else keep
        sights = {span: Visibility(span_keys(batch, span)) for span in spans}
        with ExitStack() as stack:
            cap = stack.enter_context(capture(model, wanted, batch, queries="generated"))
            for sight in sights.values():
                stack.enter_context(tapping(model, sight))
            replies = generate(model, batch, max_new_tokens=max_new_tokens, stop="\n")
        yield batch, cap, replies, {span: sight.seen.any(-1) for span, sight in sights.items()}
        bar.update(len(batch))
    bar.close()


def span_keys(prompts: Prompts, span: str, first: str | None = None) -> KeysOf:
    """The tokens of a span as keys of the last token of a prompt and all later ones, see `Visibility`.

    Args:
        prompts: A batch.
        span: Name of the span; a prompt without it has no such keys.
        first: Span that begins at the first query, in place of the last token of the prompt.
    """
    starts = [prompt.spans[first][0][0] if first is not None else len(prompt) - 1 for prompt in prompts]
    return keys_from(starts, [[k for place in prompt.spans.get(span, ()) for k in range(*place)] for prompt in prompts])


def counted(
    prompts: Prompts,
    replies: list[Reply],
    recall: float | None,
    score: Callable[[int, Prompt, Reply], Tensor],
    seen: Bool[Tensor, "b l h"],
) -> list[Tensor]:
    """`score(b, prompt, reply)`, Float [l h], of each prompt; NaN where the reply does not contain the answer.

    It is NaN as well for heads that cannot see what is scored, as `seen` says.
    """
    found = []
    for b, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        value = score(b, prompt, reply).float().masked_fill(~seen[b], torch.nan)
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
