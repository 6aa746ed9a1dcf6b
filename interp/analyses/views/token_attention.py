"""Attention on the text itself: what some heads look at when the model begins its answer."""

from collections.abc import Sequence

from torch import nn

from interp.findings import TokenView
from interp.hooks.generate import generate
from interp.hooks.model.heads import Head, HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import capture, run
from interp.hooks.read.keep import rows


def view(model: nn.Module, prompts: Prompts, heads: Sequence[Head]) -> TokenView:
    """The attention row of each head at the last token of one prompt, from which the answer begins.

    weights[head][k] = pattern[head, last, k]; only these rows are computed.
    """
    prompt = prompts[0]
    chosen = HeadSet(tuple(heads))
    with capture(model, rows(), prompts, heads=chosen, queries=[len(prompt) - 1]) as cap:
        run(model, prompts, logits_to_keep=1)
    pattern = cap[rows()][0, :, 0]
    order = list(chosen)
    tokenizer = prompts.tokenizer
    tokens = [tokenizer.decode([token]) if tokenizer else str(token) for token in prompt.ids]
    (reply,) = generate(model, prompts, max_new_tokens=16, stop="\n")
    return TokenView(
        title=str(prompt.meta.get("question", "one prompt")),
        tokens=tuple(tokens),
        weights={str(head): tuple(round(float(x), 6) for x in pattern[order.index(head)]) for head in heads},
        marks={name: tuple(prompt.spans[name]) for name in ("answer", "needle") if name in prompt.spans},
        written=reply.text,
    )
