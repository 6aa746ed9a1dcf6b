"""The logits of the right and the wrong answer after a prompt."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.analyses.measures.continuations import Options
from interp.errors import PromptError
from interp.hooks.model.finite import check_logits
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs


def logit_difference(logits: Float[Tensor, "b v"], prompts: Prompts) -> Float[Tensor, "b"]:
    """Logit of the right answer minus logit of the wrong one, each the first token of the first one in the meta.

    Args:
        logits: Logits at the last position.
        prompts: Prompts with "right" and "wrong" in their meta.

    Raises:
        PromptError: If a prompt has no such answers, or both begin with the same token.
    """
    ids = answer_tokens(prompts).to(logits.device)
    right, wrong = logits.gather(1, ids).unbind(1)
    return right - wrong


def answer_tokens(prompts: Prompts) -> Int[Tensor, "b 2"]:
    """First token of the first of meta["right"], and of the first of meta["wrong"].

    Args:
        prompts: Prompts with "right" and "wrong" in their meta.

    Raises:
        PromptError: If a prompt has no such answers, or both begin with the same token.
    """
    options = Options.of(prompts)
    rows = [(ids[0][0], ids[count][0]) for ids, count in zip(options.ids, options.right, strict=True)]
    for number, (right, wrong) in enumerate(rows):
        if right == wrong:
            raise PromptError(
                f"the right and the wrong answer of prompt {number} both begin with token {right}; give answers that "
                "differ in their first token, or a custom metric."
            )
    return torch.tensor(rows)


def logit_differences(model: Any, prompts: Prompts, batch_size: int = 8) -> Float[Tensor, "p"]:
    """`logit_difference` after each prompt, float32.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one, with any context open on it.
        prompts: Prompts with "right" and "wrong" in their meta.
        batch_size: Number of prompts per forward pass.

    Raises:
        PromptError: If a prompt has no such answers, or both begin with the same token.
    """
    parts = []
    for batch in prompts.batches(batch_size):
        with torch.no_grad():
            inputs = model_inputs(model, batch)
            logits = check_logits(model, model(**inputs, use_cache=False, logits_to_keep=1).logits, inputs)
        parts.append(logit_difference(logits[:, -1].float(), batch).float().cpu())
    return torch.cat(parts)
