"""No analysis scores a model whose attention is NaN: each raises an error that names the layer and the dtype."""

from typing import Any

import pytest
import torch
from tokenizers_tiny import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from interp.analyses import registry, tasks
from interp.analyses.tasks import standard
from interp.errors import ModelError

SIZES = standard.PromptSizes(
    n_needles=2, needle_length=700, n_texts=2, text_length=60, n_repeated=9, n_pairs=4, training_steps=2
)
ENTRIES = [
    entry
    for entry in registry.entries()
    if entry.thing.__module__.startswith("interp.analyses.identify.") and entry.prompts is not None and not entry.needs
]
OWN: dict[str, dict[str, Any]] = {
    "qada": {"sink": 2, "window": 16, "refresh": 8, "min_keys": 8},
    "function_vectors": {"right_only": False},
    "duo_gates": {"steps": 2, "batch_size": 1, "sink": 1, "recent": 8},
}
MADE: dict[str, Any] = {
    "context_entropy": lambda sizes, tokenizer: tasks.contexts(tokenizer, questions=1, each=3, length=700),
    "duo_gates": lambda sizes, tokenizer: tasks.passkeys(tokenizer, n=2, lengths=(900,), keys=2, words=2),
}
"""shorter prompts, where the standard ones are too long or too short for a tokenizer of bytes"""


def nan_model(vocab_size: int, value: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, eos_token_id=299, pad_token_id=298,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        attention: Any = model.model.layers[1].self_attn
        attention.k_proj.weight[0, 0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_no_analysis_scores_a_model_that_computes_nan(demo, entry, value):
    tokenizer, vocab = byte_level(bos=True, chat=False), 300
    if entry.group == "patching":
        tokenizer, vocab = demo.tokenizer, demo.model.config.vocab_size
    prompts = MADE.get(entry.name, entry.prompts)(SIZES, tokenizer)
    sides = (prompts,) if not entry.paired else prompts[::-1] if entry.partners_first else prompts
    with pytest.raises(ModelError, match=r"(layer 1|NaN or infinite).*(NaN or infinite|layer 1).*float32; load"):
        entry.thing(nan_model(vocab, value), *sides, **{"batch_size": 2, **OWN.get(entry.name, {})})
