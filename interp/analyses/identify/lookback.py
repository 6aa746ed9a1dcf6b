"""Lookback: how much a head reads the prompt rather than what the model has generated since."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses import costs
from interp.analyses.identify._replies import span_keys
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.reply_limit import AT_LIMIT, at_limit
from interp.analyses.tasks import standard
from interp.errors import PromptError
from interp.hooks.generate import Reply, generate
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import Mass, mass
from interp.hooks.read.visibility import Visibility
from interp.hooks.seam import tapping

CONTEXT, REPLY = "context of the lookback", "reply so far"
"""names of the two spans"""
__all__ = ["lookback", "lookback_features"]


@analysis(
    title="Lookback",
    group="attention patterns",
    order=11,
    prompts=standard.needles,
    own_prompts=standard.with_context,
    run_settings={"context": "context", "max_new_tokens": "$reply_tokens"},
    max_new_tokens="reply_tokens",
    cost=costs.decoding_and_reading(mass(CONTEXT, REPLY), max_new_tokens=REPLY_TOKENS),
)
def lookback(
    model: nn.Module,
    prompts: Prompts,
    *,
    replies: Sequence[Reply] | None = None,
    context: str | None = None,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by its lookback ratio: attention to the prompt relative to attention to the reply so far.

    Both are attention per token.

    Where token t of the reply is generated, `c[n l h t] = mean over k in the prompt of pattern[n l h r_t k]`, and g is
    the mean over the t tokens generated before; r_t is the query that gives token t. `LR = c / (c + g)`, which is 0.5
    where both are read alike, and `score[n l h] = mean over t >= 1 of LR`. At t = 0 nothing is generated yet and there
    is no ratio.

    Replies are read in one forward pass, which gives what decoding with a cache gives. `lookback_features` returns the
    ratio of each token.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Any prompts, such as `tasks.needle`.
        replies: One Reply for each prompt, read as given; None lets the model generate them greedily.
        context: Span that takes the place of the whole prompt.
        max_new_tokens: Number of new tokens of a generated reply, at most.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, from 0 to 1; NaN for a reply of fewer than two tokens, and where the
            window of a layer hides the context from the whole reply. For generated replies, the extra "at_limit" marks
            those that ended at `max_new_tokens`.

    Raises:
        PromptError: If replies and prompts differ in number.
        SpanError: If a prompt has no such context.

    Examples:
        >>> scores = interp.identify.lookback(model, prompts, max_new_tokens=4)
        >>> scores.per_prompt.shape
        torch.Size([2, 2, 4])

    Source:
        Chuang et al. 2407.07071.

    Differs:
        NaN at t = 0, where the released code divides by zero tokens. A head that attends to neither side has no ratio.

    Limits:
        Does not show that what is read is used, nor that a reply is true; the paper fits a classifier for that. A head
        that attends to the first token looks back at every step, so name a `context` to leave that token out. A run
        takes the span "context" where a prompt has it.
    """
    generated = replies is None
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
        extras={AT_LIMIT: at_limit([reply.at_limit for reply in replies], ratios[..., 0])} if generated else {},
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
    """Lookback ratio of each head at each token of the replies: the features of a classifier of spans of text.

    A classifier takes the mean over the tokens of a span, [l h] flattened.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Any prompts.
        replies: One Reply for each prompt.
        context: Span that takes the place of the whole prompt.
        batch_size: Number of prompts per forward pass.
        progress: Show a progress bar.

    Returns:
        Tensor: Float [n l h t], where t counts the tokens of the reply; NaN at t = 0, past the end of a reply,
            and where the window of a layer hides the context from the whole reply.

    Raises:
        PromptError: If replies and prompts differ in number.
        SpanError: If a prompt has no such context.
    """
    if len(replies) != len(prompts):
        raise PromptError(
            f"{len(replies)} replies and {len(prompts)} prompts do not match; give one reply for each prompt."
        )
    if context is not None:
        prompts.span(context)
    keep, longest = mass(CONTEXT, REPLY), max((len(reply.ids) for reply in replies), default=0)
    layout = HeadLayout.of(model)
    found = torch.full((len(prompts), layout.layers, layout.heads, max(1, longest)), torch.nan)
    # at t = 0, and so in a reply of one token, there is nothing to compare with
    numbers = [number for number, reply in enumerate(replies) if len(reply.ids) > 1]
    items = tuple(_with_reply(prompts[number], replies[number], context) for number in numbers)
    title = "lookback" if progress else None
    at = iter(numbers)
    sight = Visibility()

    def kept(batch: Prompts) -> Mass:
        sight.start(span_keys(batch, CONTEXT, first=REPLY))
        return keep

    with tapping(model, sight):
        for batch, cap in read(
            model, replace(prompts, items=items), kept, queries=REPLY, batch_size=batch_size, progress=title
        ):
            both = cap[keep]
            steps = both.shape[3]
            sizes = torch.tensor([sum(stop - start for start, stop in prompt.spans[CONTEXT]) for prompt in batch])
            context_mean = both[..., 0] / sizes[:, None, None, None]
            reply_mean = both[..., 1] / torch.arange(1, steps + 1)
            ratio = (context_mean / (context_mean + reply_mean)).masked_fill(~sight.seen.any(-1)[..., None], torch.nan)
            for row in ratio:
                found[next(at), :, :, 1 : steps + 1] = row
    return found


def _with_reply(prompt: Prompt, reply: Reply, context: str | None) -> Prompt:
    start, ids = len(prompt), (*prompt.ids, *reply.ids[:-1])
    spans = {
        CONTEXT: prompt.spans[context] if context is not None else ((0, start),),
        # the last token is generated and never read; each query is the newest key of the reply
        REPLY: ((start, len(ids)),),
    }
    return replace(prompt, ids=ids, spans=spans)
