"""Tiny random models of eleven decoder families: two layers, four heads of 16, windows of 32; no network."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 128
WINDOW = 32
SHARPNESS = 8.0

SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = SIZE | {"num_key_value_heads": 2}
HEAD: dict[str, Any] = {"head_dim": 16}


def _gpt2(num_hidden_layers: int) -> PreTrainedConfig:
    sizes: dict[str, Any] = {"n_positions": 2048, "n_embd": 64, "n_layer": num_hidden_layers, "n_head": 4}
    dropouts: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tf.GPT2Config(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes, **dropouts)


# name -> config for a number of layers; where a family alternates windows, even layers have them
CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": lambda n: tf.LlamaConfig(**GROUPED, **HEAD, num_hidden_layers=n),
    "qwen2": lambda n: tf.Qwen2Config(**GROUPED, num_hidden_layers=n),
    "qwen3": lambda n: tf.Qwen3Config(**GROUPED, **HEAD, num_hidden_layers=n),
    "mistral": lambda n: tf.MistralConfig(**GROUPED, **HEAD, num_hidden_layers=n, sliding_window=WINDOW),
    "gemma2": lambda n: tf.Gemma2Config(
        **GROUPED, **HEAD, num_hidden_layers=n, sliding_window=WINDOW, query_pre_attn_scalar=16
    ),
    "gemma3": lambda n: tf.Gemma3TextConfig(
        **GROUPED,
        **HEAD,
        num_hidden_layers=n,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(n)],
    ),
    "gpt2": _gpt2,
    "gpt_neox": lambda n: tf.GPTNeoXConfig(**SIZE, num_hidden_layers=n),
    "phi3": lambda n: tf.Phi3Config(**GROUPED, num_hidden_layers=n),
    "olmo2": lambda n: tf.Olmo2Config(**GROUPED, num_hidden_layers=n),
    "gpt_oss": lambda n: tf.GptOssConfig(
        **GROUPED,
        **HEAD,
        num_hidden_layers=n,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 150_000.0},
    ),
}


def make(name: str, seed: int = 0, layers: int = 2, attn_implementation: str | None = None) -> PreTrainedModel:
    """A model of the family in eval mode and float32; its attention is sharper than uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](layers), attn_implementation=attn_implementation)
        for parameter, weight in model.named_parameters():
            _spread(parameter, weight.data)
    return model.eval()


def _spread(parameter: str, weight: torch.Tensor) -> None:
    """Make attention depend on content: larger q and k projections, and learned sinks that differ by head."""
    if parameter.endswith("sinks"):
        weight.normal_()
    elif "q_norm" in parameter or "k_norm" in parameter:
        # a normed q or k forgets the size of its projection
        weight.add_(0.5)
    elif weight.dim() >= 2 and any(
        part in parameter for part in ("q_proj", "k_proj", "qkv", "c_attn", "query_key_value")
    ):
        weight.mul_(SHARPNESS)


def _maker(name: str) -> Callable[[], PreTrainedModel]:
    return lambda: make(name)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {name: _maker(name) for name in CONFIGS}
