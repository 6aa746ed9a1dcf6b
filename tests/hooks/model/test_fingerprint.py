"""Fingerprints: equal for weights that act alike, different for all others, and unknown where nothing can be read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from interp.errors import ScoreError
from interp.hooks.model.fingerprint import UNKNOWN, weights_hash
from interp.hooks.model.provenance import Provenance

CPU = torch.device("cpu")


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 300,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).eval()


def lora(**settings: Any) -> Any:
    torch.manual_seed(1)
    chosen = {"target_modules": ["q_proj", "v_proj"], "r": 2} | settings
    made = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", **chosen)).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    return made


def without(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    def made(_: Any) -> Any:
        model = lora()
        change(model)
        return model

    return made


def packed(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def rescaled(model: Any) -> Any:
    model.model.rotary_emb.inv_freq /= 2
    return model


def flipped(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(-3)
    return model


def two_adapters(active: str) -> Any:
    model = lora()
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    model.set_adapter(active)
    return model


def used(model: Any) -> Any:
    with torch.no_grad():
        model(torch.ones(1, 40, dtype=torch.long))
    return model


def half_strength(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "merged_adapters"):
            module.scaling["default"] /= 2


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
SAME = {
    "the same model again": (llama, llama),
    "after a forward pass": (llama, lambda: used(llama())),
    "frequencies that follow the length": (
        lambda: llama(rope_parameters=DYNAMIC, max_position_embeddings=16),
        lambda: used(llama(rope_parameters=DYNAMIC, max_position_embeddings=16)),
    ),
    "tied weights": (lambda: llama(tie_word_embeddings=True), lambda: used(llama(tie_word_embeddings=True))),
    "an adapter that is disabled": (llama, lambda: without(lambda model: model.base_model.disable_adapter_layers())(0)),
    "an adapter that was unloaded": (llama, lambda: lora().unload()),
    "an adapter merged and unloaded": (lambda: merged(), lambda: lora().merge_and_unload()),
    "an adapter next to the active one": (lora, lambda: two_adapters("default")),
    "the model inside of one of peft": (lora, lambda: lora().get_base_model()),
    "layers kept on the CPU": (llama, lambda: cpu_offload(llama(), execution_device=CPU)),
    "packed weights": (lambda: packed(llama()), lambda: packed(llama())),
}
OTHER = {
    "a weight": (llama, lambda: flipped(llama())),
    "a layer less": (llama, lambda: llama(num_hidden_layers=1)),
    "another dtype": (llama, lambda: llama().to(torch.bfloat16)),
    "a buffer": (llama, lambda: rescaled(llama())),
    "an active adapter": (llama, lora),
    "the adapter disabled": (lora, lambda: without(lambda model: model.base_model.disable_adapter_layers())(0)),
    "the adapter merged": (llama, lambda: merged()),
    "the other adapter": (lora, lambda: two_adapters("other")),
    "the strength of the adapter": (lora, lambda: without(half_strength)(0)),
    "a module saved with the adapter": (
        lambda: lora(modules_to_save=["lm_head"]),
        lambda: changed_head(lora(modules_to_save=["lm_head"])),
    ),
    "virtual tokens": (
        llama,
        lambda: get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    ),
    "packed weights": (lambda: packed(llama()), lambda: packed(flipped(llama()))),
    "layers kept on the CPU": (
        lambda: cpu_offload(llama(), execution_device=CPU),
        lambda: cpu_offload(flipped(llama()), execution_device=CPU),
    ),
}


def merged() -> Any:
    model = lora()
    model.merge_adapter()
    return model


def changed_head(model: Any) -> Any:
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    return model


@pytest.mark.parametrize("name", SAME)
def test_weights_that_act_alike_have_one_fingerprint(name):
    one, other = (weights_hash(make()) for make in SAME[name])
    assert one == other
    assert len(one) == 16


@pytest.mark.parametrize("name", OTHER)
def test_other_weights_have_another_fingerprint(name):
    one, other = (weights_hash(make()) for make in OTHER[name])
    assert one != other
    assert UNKNOWN not in (one, other)


def test_layers_kept_on_a_disk_are_read_once(tmp_path):
    model = disk_offload(llama(), tmp_path / "weights", execution_device=CPU)
    assert weights_hash(model) == weights_hash(llama())
    for path in (tmp_path / "weights").iterdir():
        path.unlink()
    assert weights_hash(model) == weights_hash(llama())


def test_a_disabled_adapter_is_seen_inside_of_its_context():
    model = lora()
    active = Provenance.of(model)
    with model.disable_adapter():
        assert not Provenance.of(model).same_model(active)
        assert Provenance.of(model).same_model(Provenance.of(llama()))
    assert Provenance.of(model).same_model(active)


def test_weights_without_values_are_unknown_and_equal_nothing():
    with torch.device("meta"):
        model = llama()
    assert weights_hash(model) == UNKNOWN
    known = Provenance.of(model)
    assert not known.same_model(known)
    with pytest.raises(ScoreError, match="cannot be read") as caught:
        known.check_model(llama())
    assert "\n" not in str(caught.value)


def test_a_large_weight_is_sampled_over_all_its_columns():
    module = nn.Linear(1024, 64, bias=False)
    before = weights_hash(module)
    seen = 0
    for column in range(0, 1024, 64):
        with torch.no_grad():
            module.weight[:, column] += 1
        seen += weights_hash(module) != before
        before = weights_hash(module)
    assert seen == 16
