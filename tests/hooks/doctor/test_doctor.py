"""A sound model passes, a model broken on purpose fails the matching check, and nothing remains on the model."""

import json
import types
from typing import Any

import pytest
import tokenizers_tiny
import torch
import transformers as tf

import interp
from interp.errors import ModelError
from interp.hooks.doctor.checks import CHECKS
from interp.hooks.doctor.doctor import doctor
from interp.testing import families


@pytest.mark.parametrize("name", families.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_models_pass(name, dtype):
    model = families.make(name).to(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    implementation, shown = model.config._attn_implementation, repr(model)
    found = doctor(model)
    assert found.ok, str(found)
    assert all(found[check].ok for check in ("seam", "heads", "idle", "reading", "rows", "padding", "generation"))
    windowed = {"mistral": "[0, 1]", "gemma2": "[0]", "gemma3": "[0]", "gpt_oss": "[0]"}
    assert found["windows"].detail == (f"32 keys in layers {windowed[name]}" if name in windowed else "none")
    assert ("one per head in layers [0, 1]" in found["learned sinks"].detail) == (name == "gpt_oss")
    assert ("capped at 50.0" in found["soft-cap"].detail) == (name == "gemma2")
    assert str(dtype).removeprefix("torch.") in found["attention"].detail
    assert repr(model) == shown
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def sabotaged(forward, layer=1) -> Any:
    """A llama in which one attention layer has another forward."""
    model: Any = families.make("llama")
    attention = model.model.layers[layer].self_attn
    attention.forward = types.MethodType(forward(type(attention).forward), attention)
    return model


def without_interface(original):
    """Attention to the position itself, without the interface."""

    def forward(self, hidden_states, *args, **kwargs):
        value = self.v_proj(hidden_states).unflatten(-1, (2, 16)).repeat_interleave(2, 2)
        return self.o_proj(value.flatten(-2)), None

    return forward


def masked(original):
    """The interface, after a computation with the mask."""

    def forward(self, hidden_states, *args, attention_mask=None, **kwargs):
        seen = 1.0 if attention_mask is None else attention_mask.float().mean()
        return original(self, hidden_states * (1 + seen), *args, attention_mask=attention_mask, **kwargs)

    return forward


def grouped(original):
    """The interface with two of the four heads, twice."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS

        q, k, v = (
            p(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, q[:, :2], k[:, :1], v[:, :1], attention_mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(torch.cat([out, out], 2).flatten(-2)), None

    return forward


def test_a_layer_that_is_never_reached():
    found = doctor(sabotaged(without_interface))
    assert found.failed == ("seam",)
    assert found["seam"].detail.startswith("layers [1] of 2 never called")


def test_a_layer_that_computes_with_the_mask():
    found = doctor(sabotaged(masked))
    assert "idle" in found.failed
    assert "a layer computes with the attention mask" in found["idle"].detail


def test_a_layer_with_fewer_heads_than_the_config_states():
    found = doctor(sabotaged(grouped))
    assert "heads" in found.failed
    assert "but layer 1 has 2 query heads over 1 kv heads of dimension 16" in found["heads"].detail
    assert "output projection of layer 1 has 64 inputs" in found["heads"].detail


def test_a_config_that_differs_from_the_model():
    model = families.make("llama")
    model.config.num_attention_heads = 8
    found = doctor(model)
    assert found.failed == ("heads",)
    assert "8 query heads over 2 kv heads of dimension 16, but layer 0 has 4 query heads" in found["heads"].detail
    model = families.make("mistral")
    # the mask follows the config while the model runs, and the layer reports the window that it received
    model.config.layer_types = ["full_attention", "sliding_attention"]
    found = doctor(model)
    assert found.failed == ("windows",)
    assert "layer 0 attends to 32 keys, but the config states all keys" in found["windows"].detail


def test_padding_that_changes_the_model_itself():
    model: Any = families.make("llama")
    embed = model.get_input_embeddings()
    # the embedding depends on the width of the batch
    embed.register_forward_hook(lambda module, args, out: out + out.shape[1] / 100)
    found = doctor(model)
    assert "padding" in found.failed
    assert "the model does this without interp as well" in found["padding"].detail
    assert found["idle"].ok
    assert found["reading"].ok


@pytest.mark.parametrize(
    "config",
    [
        tf.GPTJConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=256, rotary_dim=8, eos_token_id=2),
        tf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    ],
    ids=["gptj", "bloom"],
)
def test_a_family_without_the_interface_is_reported(config):
    found = doctor(tf.AutoModelForCausalLM.from_config(config))
    assert found.failed == ("seam",)
    assert "does not compute attention through" in found["seam"].detail
    assert found["padding"].ok is None


def test_a_model_without_attention_is_reported():
    found = doctor(
        tf.AutoModelForCausalLM.from_config(tf.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1))
    )
    assert {"seam", "heads"} <= set(found.failed)


def test_a_model_that_fails_is_reported():
    def forward(original):
        def broken(self, *args, **kwargs):
            raise ZeroDivisionError("on purpose")

        return broken

    found = doctor(sabotaged(forward))
    assert found["seam"].detail == "the model raised ZeroDivisionError: on purpose"


def test_training_mode_is_restored():
    model: Any = families.make("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert doctor(model).ok
    assert [module.training for module in model.modules()] == modes


def test_tokenizer():
    assert doctor(families.make("llama"), tokenizers_tiny.words())["tokenizer"].ok
    found = doctor(families.make("llama"), tokenizers_tiny.byte_level())
    assert found.failed == ("tokenizer",)
    assert "but the model 128" in found["tokenizer"].detail


def test_table_and_json():
    found = doctor(families.make("llama"))
    lines = str(found).splitlines()
    assert len(lines) == len(CHECKS) + 2
    assert lines[0] == "LlamaForCausalLM"
    assert lines[-1] == "all checks passed"
    loaded = json.loads(json.dumps(found.to_dict()))
    assert loaded["ok"] is True
    assert [check["name"] for check in loaded["checks"]] == list(CHECKS)
    assert str(doctor(sabotaged(without_interface))).endswith("1 of 13 checks failed")


GEMMA4: Any = {
    "global_head_dim": 16, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0
}  # fmt: skip
SMALL: Any = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
WIDTHS = {
    # the width that the config calls head_dim is the rotary part of the keys
    "keys wider than values": (
        lambda: tf.DeepseekV3ForCausalLM(
            tf.DeepseekV3Config(
                **SMALL, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
                v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1,
            )
        ),
        6,
        "2 layers of 4 query heads over 4 kv heads of dimension 6",
    ),
    "layers of two widths": (
        lambda: tf.Gemma4ForCausalLM(
            tf.Gemma4TextConfig(
                **SMALL, **GEMMA4, num_key_value_heads=2, head_dim=8, sliding_window=4,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        16,
        "2 layers of 4 query heads over 2 kv heads of dimension 8 and 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WIDTHS)
def test_widths_of_heads_that_differ_are_no_fault(case):
    torch.manual_seed(0)
    make, width, detail = WIDTHS[case]
    model = make().eval()
    assert interp.HeadLayout.of(model).head_dim == width
    found = doctor(model)
    assert found.ok, found.failed
    assert found["heads"].detail == detail


def test_layers_with_different_numbers_of_heads_are_refused():
    config = tf.Gemma4TextConfig(**SMALL, num_key_value_heads=2)
    config.per_layer_config = {0: {"num_key_value_heads": 1}}
    with pytest.raises(ModelError, match=r"differ in num_key_value_heads \(1, 2\)"):
        interp.HeadLayout.of(config)
