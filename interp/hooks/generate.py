"""Greedy decoding of replies to a batch of prompts, with the generate() method of the model."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.hooks.model.finite import check_logits
from interp.hooks.model.layers import unwrap
from interp.hooks.prompts.prompts import Prompt, Prompts
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


Ended = Callable[[str, Prompt], bool]
"""function of a reply so far and its prompt that returns whether the reply ends here"""


def generate(
    model: nn.Module,
    prompts: Prompts,
    *,
    max_new_tokens: int = 32,
    stop: str | None = None,
    ended: Ended | None = None,
) -> list[Reply]:
    """Generate replies by greedy decoding, with a KV cache, for one batch padded on the left.

    The generation settings that a model is shipped with, such as a repetition penalty, are not applied.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: The prompts of the batch.
        max_new_tokens: Maximum number of tokens of a reply.
        stop: A text that ends a reply, such as a newline. It is ignored where the prompts have no tokenizer.
        ended: Function of a reply so far and its prompt that returns whether the reply ends here, for a use to which
            more text makes no difference. It is ignored where the prompts have no tokenizer.

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
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    network: Any = unwrap(model)
    tokenizer = prompts.tokenizer
    ended = None if tokenizer is None else ended
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
    )
    n = inputs["input_ids"].shape[1]
    stop = None if tokenizer is None else stop
    criteria = [] if ended is None and stop is None else [_EndedRows(prompts, n, ended, stop)]
    # generate() fills open settings from those of the model, and a repetition penalty would work against copying
    network.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            check: Any = LogitsProcessorList([_Finite(network, inputs)])
            tokens = network.generate(
                **inputs,
                generation_config=config,
                logits_processor=check,
                stopping_criteria=StoppingCriteriaList(criteria),
            )
    finally:
        network.generation_config = own
    lengths = criteria[0].lengths if criteria else [sys.maxsize] * len(prompts)
    rows = zip(tokens[:, n:].tolist(), lengths, strict=True)
    # a reply that ended is not at the limit, even if it has as many tokens
    limits = [max_new_tokens if length > max_new_tokens else -1 for length in lengths]
    return [
        _reply(row[:length], ends, stop, tokenizer, limit) for (row, length), limit in zip(rows, limits, strict=True)
    ]


class _EndedRows:
    """Which rows end here, as a stopping criterion of transformers.

    The criterion of transformers for stop texts goes through the whole vocabulary in each call of generate(), which
    takes longer than some steps, and fails on tokenizers of whole words.
    """

    def __init__(self, prompts: Prompts, n: int, ended: Ended | None, stop: str | None) -> None:
        self.prompts, self.n, self.ended, self.stop = prompts, n, ended, stop
        self.lengths = [sys.maxsize] * len(prompts)
        """number of new tokens of each row that has ended"""
        self._stopped = [False] * len(prompts)
        # a character has up to 4 tokens, and some tokens have no character
        self._tail = 0 if stop is None else 8 * len(stop)

    def __call__(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        tokenizer: Any = self.prompts.tokenizer
        new = tokens[:, self.n :].tolist()
        for row, prompt in enumerate(self.prompts):
            if self._stopped[row] or len(new[row]) >= self.lengths[row]:
                continue
            if self.ended is not None and self.ended(tokenizer.decode(new[row], skip_special_tokens=True), prompt):
                self.lengths[row] = len(new[row])
            if self.stop is not None:
                self._stopped[row] = self.stop in tokenizer.decode(new[row][-self._tail :])
        done = [stopped or length <= len(new[0]) for stopped, length in zip(self._stopped, self.lengths, strict=True)]
        return torch.tensor(done, device=tokens.device)


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
