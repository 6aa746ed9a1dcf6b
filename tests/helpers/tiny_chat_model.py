"""A tiny model with a tokenizer of its own, in memory and as a folder; it has learned nothing."""

from pathlib import Path
from typing import Any

import torch
from tokenizers_tiny import byte_level
from transformers import AutoModelForCausalLM, LlamaConfig

from interp.testing import families


def tokenizer() -> Any:
    return byte_level(pad=True)


def model(seed: int = 0) -> Any:
    sizes = families.GROUPED | {"vocab_size": len(tokenizer()), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **families.HEAD, num_hidden_layers=2))
    return made.eval()


def folder(path: Path, seed: int = 0) -> Path:
    """Written as transformers writes it: config, safetensors, tokenizer."""
    model(seed).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
