"""Greedy decoding of replies to a batch of prompts, with the generate() method of the model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from interp.hooks.model.finite import check_logits
from interp.hooks.model.layers import unwrap
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs


@dataclass(frozen=True)
class Reply:
    """The text generated after a prompt, up to the end token or the stop text, which are not included."""

    ids: tuple[int, ...]
    """The token ids."""
    text: str
    """The decoded text without special tokens; "" where the prompts have no tokenizer."""
    at_limit: bool = False
    """Whether it ended at the largest number of new tokens, without an end token or the stop text."""


def generate(model: nn.Module, prompts: Prompts, *, max_new_tokens: int = 32, stop: str | None = None) -> list[Reply]:
    """Generate replies by greedy decoding, with a KV cache, for one batch padded on the left.

    The generation settings that a model is shipped with, such as a repetition penalty, are not applied.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: The prompts of the batch.
        max_new_tokens: Maximum number of tokens of a reply.
        stop: A text that ends a reply, such as a newline. It is ignored where the prompts have no tokenizer.

    Returns:
        One reply for each prompt.

    Raises:
        PromptError: If a prompt and its reply do not fit into the context of the model.
        ModelError: If a logit is NaN or infinite.

    Examples:
        >>> from interp.hooks.generate import generate
        >>> replies = generate(model, prompts, max_new_tokens=4)
        >>> len(replies), all(len(reply.ids) <= 4 for reply in replies)
        (2, True)
    """
    from transformers import GenerationConfig, LogitsProcessorList

    network: Any = unwrap(model)
    tokenizer = prompts.tokenizer
    inputs = model_inputs(network, prompts, more=max_new_tokens)
    del inputs["position_ids"]
    own = network.generation_config
    ends = getattr(own, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=prompts.pad_id,
        stop_strings=None if stop is None or tokenizer is None else [stop],
    )
    # generate() fills open settings from those of the model, and a repetition penalty would work against copying
    network.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            check: Any = LogitsProcessorList([_Finite(network, inputs)])
            tokens = network.generate(**inputs, generation_config=config, tokenizer=tokenizer, logits_processor=check)
    finally:
        network.generation_config = own
    new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    return [_reply(row, ends, stop, tokenizer, max_new_tokens) for row in new]


@dataclass(frozen=True, eq=False)
class _Finite:
    """A logits processor that refuses NaN, of which greedy decoding would take the first token of the vocabulary."""

    network: Any
    inputs: dict[str, Any]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = self.inputs["attention_mask"]
        grown = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        return check_logits(self.network, scores, {"input_ids": ids, "attention_mask": grown})


def _reply(row: list[int], ends: list[int], stop: str | None, tokenizer: Any, limit: int) -> Reply:
    length = next((i for i, token in enumerate(row) if token in ends), len(row))
    ids = row[:length]
    if tokenizer is None:
        return Reply(tuple(ids), "", len(ids) == limit)
    if stop is not None:
        # the token that completes the stop text is not part of the reply
        cut = next((i for i in range(len(ids)) if stop in tokenizer.decode(ids[: i + 1])), len(ids))
        ids = ids[:cut]
    return Reply(tuple(ids), tokenizer.decode(ids, skip_special_tokens=True), len(ids) == limit)
