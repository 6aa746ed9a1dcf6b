"""Gates: which prompts show the behaviour that a method explains; the others say nothing about heads."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.analyses.measures.continuations import Options
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import run


def predicts(model: nn.Module, prompts: Prompts, tokens: Sequence[int], batch_size: int) -> Bool[Tensor, "n"]:
    """Whether the most probable next token after each prompt is the given one.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts to continue.
        tokens: Id of the expected token of each prompt.
        batch_size: Number of prompts per forward pass.
    """
    best = [logits.argmax(-1).cpu() for logits in _next_logits(model, prompts, batch_size)]
    return torch.cat(best) == torch.tensor(list(tokens))


def chooses_right(model: nn.Module, prompts: Prompts, batch_size: int) -> Bool[Tensor, "n"]:
    """Whether, of the first tokens of meta "right" and "wrong", a right one has the highest logit.

    A right answer that begins like a wrong one does not count.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with the answers in their meta.
        batch_size: Number of prompts per forward pass.

    Raises:
        PromptError: If a prompt has no such answers.
    """
    options = Options.of(prompts)
    logits = (row for batch in _next_logits(model, prompts, batch_size) for row in batch)
    found = []
    for row, ids, count in zip(logits, options.ids, options.right, strict=True):
        scores = row[[each[0] for each in ids]]
        found.append(bool(scores[:count].max() > scores[count:].max()))
    return torch.tensor(found)


def _next_logits(model: nn.Module, prompts: Prompts, batch_size: int) -> Iterator[Float[Tensor, "b v"]]:
    for batch in prompts.batches(batch_size):
        yield run(model, batch, logits_to_keep=1).logits[:, -1].float()
