"""Lookback: how much a head reads the prompt rather than what the model has written since."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError
from interp.hooks.generate import Reply, generate
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import mass

CONTEXT, WRITTEN = "looked back at", "written"
REPLY = 32
"""new tokens that a reply may take"""


def lookback(
    model: nn.Module,
    prompts: Prompts,
    *,
    replies: Sequence[Reply] | None = None,
    context: str | None = None,
    max_new_tokens: int = REPLY,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Lookback ratio: attention per token of the prompt, beside attention per token of the reply so far.

    Where token t of the reply is made, c[n l h t] = mean over k in the prompt of pattern[n l h r_t k], g the mean over
    the t tokens written before, r_t the query that gives token t. LR = c / (c + g), 0.5 where both are read alike;
    score[n l h] = mean over t >= 1 of LR. At t = 0 nothing is written and no ratio is taken.
    replies: one Reply a prompt, read as they stand; None lets the model write greedily, up to max_new_tokens. A reply
    of fewer than two tokens does not count (NaN). context: a span that takes the place of the whole prompt.
    Replies are read in one forward, which gives what decoding with a cache gives; `lookback_features` has each token.
    Raises PromptError (replies and prompts differ in number), SpanError (a prompt without the context).
    Source: Chuang et al. 2407.07071. Differs: NaN at t = 0, where the released code divides by nothing; a
    head that gives nothing to either side has no ratio.
    Cannot show: that what is read was used, nor that a reply is true; the paper fits a classifier for that. A head that
    rests on the first token looks back all of the time: name a `context` to leave it out.
    """
    if replies is None:
        replies = [
            reply
            for batch in prompts.batches(batch_size)
            for reply in generate(model, batch, max_new_tokens=max_new_tokens)
        ]
    ratios = lookback_features(model, prompts, replies, context=context, batch_size=batch_size, progress=progress)
    return HeadScores(
        name="lookback",
        per_prompt=ratios.nanmean(-1),
        unit="share of attention per token",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"context": context, "max_new_tokens": max_new_tokens},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        seed=seed,
        labels=tuple(f"{len(reply.ids)} tokens written" for reply in replies),
    )


def lookback_features(
    model: nn.Module,
    prompts: Prompts,
    replies: Sequence[Reply],
    *,
    context: str | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Float[Tensor, "n l h t"]:
    """The lookback ratio of each head at each token of the replies: the features of a classifier of spans of text.

    As `lookback`; t counts the tokens of the reply, NaN at t = 0 and past a reply's end. A classifier takes the mean
    over the tokens of a span, [l h] flattened. Raises PromptError, SpanError.
    """
    if len(replies) != len(prompts):
        raise PromptError(f"{len(replies)} replies to {len(prompts)} prompts: give one for each.")
    if context is not None:
        prompts.span(context)
    keep, longest = mass(CONTEXT, WRITTEN), max((len(reply.ids) for reply in replies), default=0)
    layout = HeadLayout.of(model)
    found = torch.full((len(prompts), layout.layers, layout.heads, max(1, longest)), torch.nan)
    # at t = 0, and so in a reply of one token, nothing is read
    numbers = [number for number, reply in enumerate(replies) if len(reply.ids) > 1]
    items = tuple(_with_reply(prompts[number], replies[number], context) for number in numbers)
    title = "lookback" if progress else None
    at = iter(numbers)
    for batch, cap in read(
        model, replace(prompts, items=items), keep, queries=WRITTEN, batch_size=batch_size, progress=title
    ):
        both = cap[keep]
        steps = both.shape[3]
        sizes = torch.tensor([sum(stop - start for start, stop in prompt.spans[CONTEXT]) for prompt in batch])
        context_mean = both[..., 0] / sizes[:, None, None, None]
        written_mean = both[..., 1] / torch.arange(1, steps + 1)
        ratio = context_mean / (context_mean + written_mean)
        for row in ratio:
            found[next(at), :, :, 1 : steps + 1] = row
    return found


def _with_reply(prompt: Prompt, reply: Reply, context: str | None) -> Prompt:
    start, ids = len(prompt), (*prompt.ids, *reply.ids[:-1])
    spans = {
        CONTEXT: prompt.spans[context] if context is not None else ((0, start),),
        # the last token is made, never read; each query is the newest of the keys that are written
        WRITTEN: ((start, len(ids)),),
    }
    return replace(prompt, ids=ids, spans=spans)
