"""Greedy replies to a batch of prompts, through the model's own generate()."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from interp.hooks.model.layers import plain
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs


@dataclass(frozen=True)
class Reply:
    """What the model wrote after a prompt, up to its end token or the stop text; neither is included."""

    ids: tuple[int, ...]
    text: str


def generate(model: nn.Module, prompts: Prompts, *, max_new_tokens: int = 32, stop: str | None = None) -> list[Reply]:
    """Decode greedily for a batch, padded on the left, KV cache on.

    stop: a text that ends a reply, such as a newline; needs the prompts' tokenizer. Settings that the model brings for
    sampling do not apply. Raises PromptError where a prompt and its reply do not fit into the context.
    """
    from transformers import GenerationConfig

    network: Any = plain(model)
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
    # what the call leaves open is filled from the model's own settings: a repetition penalty would work against copying
    network.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            tokens = network.generate(**inputs, generation_config=config, tokenizer=tokenizer)
    finally:
        network.generation_config = own
    new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    return [_reply(row, ends, stop, tokenizer) for row in new]


def _reply(row: list[int], ends: list[int], stop: str | None, tokenizer: Any) -> Reply:
    length = next((i for i, token in enumerate(row) if token in ends), len(row))
    ids = row[:length]
    if tokenizer is None:
        return Reply(tuple(ids), "")
    if stop is not None:
        # the token that brings the stop text in is not part of the reply
        cut = next((i for i in range(len(ids)) if stop in tokenizer.decode(ids[: i + 1])), len(ids))
        ids = ids[:cut]
    return Reply(tuple(ids), tokenizer.decode(ids, skip_special_tokens=True))
