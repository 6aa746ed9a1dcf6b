"""Weights in any form: the weight of a projection as it acts, the device of inputs, and the dtype of activations."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import interp
from interp.hooks.model.layers import unwrap
from interp.hooks.model.weights import acting_weight, compute_dtype, input_device, is_plain

CPU = torch.device("cpu")


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48, vocab_size=300,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted() -> Any:
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj", "lm_head"], r=2)
    model = get_peft_model(llama(), settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    return model


def packed() -> Any:
    return torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)


def offloaded() -> Any:
    return cpu_offload(llama(), execution_device=CPU)


PROJECTIONS = {
    "a linear map": lambda: nn.Linear(6, 5),
    "one of GPT-2": lambda: Conv1D(5, 6),
    "an adapter": lambda: unwrap(adapted()).model.layers[0].self_attn.o_proj,
    "packed weights": lambda: packed().model.layers[0].self_attn.o_proj,
    "weights kept elsewhere": lambda: offloaded().model.layers[0].self_attn.o_proj,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_weight_of_a_projection_maps_as_it_does(name):
    projection = PROJECTIONS[name]()
    weight = acting_weight(projection, torch.zeros(1))
    x = torch.rand(3, len(weight))
    with torch.no_grad():
        wanted = projection(x) - projection(torch.zeros_like(x))
    # packed weights round the input as well
    assert (x @ weight - wanted).abs().max() < (0.05 if name == "packed weights" else 1e-5)
    assert is_plain(projection) == (name in ("a linear map", "one of GPT-2"))


def test_inputs_go_where_the_layers_run():
    assert input_device(llama()) == CPU
    model = offloaded()
    assert next(model.parameters()).device.type == "meta"
    assert input_device(model) == CPU


def test_the_dtype_of_activations_is_that_of_an_open_autocast():
    model = llama()
    assert compute_dtype(model) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(model) == torch.bfloat16
    assert compute_dtype(model.to(torch.float16)) == torch.float16


@pytest.mark.parametrize("make", [llama, adapted, lambda: torch.compile(llama(), backend="aot_eager")])
def test_a_bridge_reads_weights_with_their_adapters(make):
    model = make()
    projection = unwrap(model).model.layers[1].self_attn.o_proj
    wanted = acting_weight(projection, torch.zeros(1)).unflatten(0, (4, -1))
    head = acting_weight(unwrap(model).lm_head, torch.zeros(1))
    with interp.bridge(model) as tl:
        assert torch.allclose(tl.blocks[1].attn.W_O, wanted)
        assert torch.allclose(tl.W_U, head)


def test_a_bridge_over_weights_kept_elsewhere_is_refused():
    with (
        pytest.raises(interp.InterpError, match="accelerate keeps weights") as caught,
        interp.bridge(cpu_offload(llama(), execution_device=CPU)),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [llama, adapted, offloaded])
def test_methods_with_gradients_and_losses_run_in_every_state(make):
    model = make()
    prompts = interp.tasks.repeated(299, n=8, batch=2)
    scores = interp.identify.gradient_importance(model, prompts)
    assert scores.values.isfinite().all()
    swept = interp.sweep(model, prompts, "zero")
    with interp.ablate(model, "L1H2", "zero"), torch.no_grad():
        logits = model(**prompts.tensors()).logits[:, -1].double().log_softmax(-1)
    with torch.no_grad():
        before = model(**prompts.tensors()).logits[:, -1].double().log_softmax(-1)
    wanted = (before.exp() * (before - logits)).sum(-1).float()
    assert torch.allclose(swept.per_prompt[:, 1, 2], wanted, atol=1e-5)
