"""What tests of a bridge share: TransformerLens' own bridge to compare with, inputs, and edits that show."""

import functools
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from interp.testing import families

QUICK = ("llama", "qwen3", "gpt2")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in families.CONFIGS]
FUSED = ("gpt2", "gpt_neox", "phi3")
Z1 = "blocks.1.attn.hook_z"
PATTERN0 = "blocks.0.attn.hook_pattern"


@functools.cache
def plain(name) -> Any:
    """TransformerLens' own bridge over a model of equal weights; attention is in its own code."""
    model = families.make(name)
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def tokens(batch=1, length=8, seed=0):
    return torch.randint(3, families.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded():
    """Two prompts, 40 and 29 long, on the left."""
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :11] = 0
    return {"input": ids, "attention_mask": mask}


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def self_only(pattern, hook):
    pattern = pattern.clone()
    pattern[:, 1] = torch.eye(pattern.shape[-2], pattern.shape[-1])
    return pattern


def rescaled(z, hook):
    return z * torch.tensor([1.0, 0.5, -6.0, 9.0])[:, None]
