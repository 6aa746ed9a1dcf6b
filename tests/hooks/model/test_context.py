"""The context that prompts are checked against is the one that transformers reads."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

import interp
from interp.errors import PromptError, UsageError
from interp.hooks.model.context import context_length, set_context_length, usual_context
from interp.hooks.read.capture import run
from interp.runs.plan import ScorePlan

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "eos_token_id": None,
}  # fmt: skip


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


LONGROPE = rope(
    "longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=32, factor=2.0
)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
# name -> config, context, and the context it was made for
CONTEXTS = {
    "plain": ({}, 64, 64),
    "YaRN": (rope("yarn", factor=4.0, original_max_position_embeddings=64), 256, 256),
    "YaRN without the original": (rope("yarn", factor=2.0), 128, 128),
    "YaRN, of which the config states all": (
        rope("yarn", factor=4.0, original_max_position_embeddings=16), 64, 64,
    ),
    "linear": (rope("linear", factor=3.0), 192, 192),
    "dynamic NTK": (rope("dynamic", factor=2.0), None, 128),
    "the RoPE of Llama 3": (LLAMA3, 64, 64),
    "LongRoPE": (LONGROPE, 64, 64),
    "in the older words": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 256, 256),
}  # fmt: skip


def made(**config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3Config(**SIZES, head_dim=8, num_key_value_heads=2, **config)).eval()


def prompts(n):
    return interp.Prompts.from_ids([torch.randint(1, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist()])


@pytest.mark.parametrize("case", CONTEXTS)
def test_a_stretched_context_is_read_as_transformers_reads_it(case):
    config, longest, usual = CONTEXTS[case]
    model = made(**config)
    assert (context_length(model), usual_context(model)) == (longest, usual)
    fits = prompts(longest or 300)
    right = model(**fits.tensors()).logits
    torch.testing.assert_close(run(model, fits).logits, right)
    assert interp.identify.sinks(model, fits).values.isfinite().all()
    if longest:
        with pytest.raises(PromptError, match=f"the context of this model is {longest:,}"):
            interp.identify.sinks(model, prompts(longest + 1))


def test_each_kind_of_layer_counts():
    config = LlamaConfig(**SIZES)
    config.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    }
    model = made()
    model.config.rope_parameters = config.rope_parameters
    assert context_length(model) == 256


@pytest.mark.parametrize("tokens", [32, 100])
def test_a_length_that_is_given_counts_first(tmp_path, tokens):
    made(**rope("dynamic", factor=2.0)).save_pretrained(tmp_path / "m")
    model = interp.load(tmp_path / "m", device="cpu", max_length=tokens).model
    assert (context_length(model), usual_context(model), context_length(copy.deepcopy(model))) == (tokens,) * 3
    with pytest.raises(PromptError, match=f"the context of this model is {tokens}"):
        interp.identify.sinks(model, prompts(tokens + 1))
    assert ScorePlan()._fitted(model).sizes.explorer_tokens == tokens


@pytest.mark.parametrize("tokens", [0, -5, 1.5, True, "64"])
def test_a_length_is_a_number_of_tokens(tokens):
    with pytest.raises(UsageError, match="is not valid; give a number of tokens of at least 1"):
        set_context_length(made(), tokens)


@pytest.mark.parametrize("config", [
    GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=None, bos_token_id=None),
    OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
              max_position_embeddings=64, word_embed_proj_dim=32),
])  # fmt: skip
def test_learned_positions_end(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    set_context_length(model, 64)
    with pytest.raises(UsageError, match="more than the 64 positions that this model has learned"):
        set_context_length(model, 65)
