"""Which attention modules are those of the text, in models that have an encoder as well."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PLBartConfig,
    PLBartForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import interp
from interp import keep
from interp.errors import ModelError, SpanError
from interp.hooks.model.layers import attention_layers

IDS: Any = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE: Any = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
AUDIO: Any = {"max_source_positions": 16, "max_target_positions": 64, "num_mel_bins": 8}
T5GEMMA: Any = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

FAMILIES = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SHAPE, **IDS, forced_eos_token_id=None)),
    "plbart": lambda: PLBartForConditionalGeneration(PLBartConfig(**SHAPE, **IDS)),
    "marian": lambda: MarianMTModel(MarianConfig(**SHAPE, **IDS, decoder_start_token_id=0)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**SHAPE, **IDS)),
    "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**SHAPE, **IDS)),
    "t5gemma": lambda: T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=T5GEMMA, decoder=T5GEMMA, **IDS)),
    "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**SHAPE, **IDS, **AUDIO)),
}
READ = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]]
WRITTEN = [[2, 20, 21, 22], [2, 23, 24, 25]]


def made(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def run(model, **more):
    """A forward pass of two rows: the encoder gets 7 tokens or a spectrum, the decoder 4 tokens."""
    inputs = (
        {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))}
        if isinstance(model, WhisperForConditionalGeneration)
        else {"input_ids": torch.tensor(READ)}
    )
    with torch.no_grad():
        return model(**inputs, decoder_input_ids=torch.tensor(WRITTEN), use_cache=False, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_read_and_edited(family):
    model, prompts = made(family), interp.Prompts.from_ids(WRITTEN)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    right = torch.stack(run(eager, output_attentions=True).decoder_attentions, 1)
    with interp.capture(model, keep.pattern(), prompts) as cap:
        run(model)
    torch.testing.assert_close(cap[keep.pattern()], right, atol=1e-5, rtol=1e-4)

    layers = attention_layers(eager)
    assert len(layers) == 2
    d = 8
    projection = next(getattr(layers[1], name) for name in ("out_proj", "o_proj") if hasattr(layers[1], name))

    def literal(module, args):
        x = args[0].clone()
        x[..., 2 * d : 3 * d] = 0
        return (x, *args[1:])

    hook = projection.register_forward_pre_hook(literal)
    expected = run(eager).logits
    hook.remove()
    assert (expected - run(eager).logits).abs().max() > 1e-5
    with interp.ablate(model, [(1, 2)], kind="zero"):
        torch.testing.assert_close(run(model).logits, expected, atol=1e-5, rtol=1e-4)
    # the first column of the decoder, which all its queries see, and nothing of the encoder
    with interp.capture(model, keep.mass((0, 1)), prompts) as cap:
        run(model)
    torch.testing.assert_close(cap[keep.mass((0, 1))][..., 0], right[..., 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "whisper"])
def test_prompts_of_the_encoder_are_refused(family):
    model = made(family)
    message = "the given prompts are not the text of the decoder"
    with pytest.raises(SpanError, match=message), interp.capture(model, keep.entropy(), interp.Prompts.from_ids(READ)):
        run(model)
    same_length = interp.Prompts.from_ids([row[:4] for row in READ])
    with pytest.raises(SpanError, match=message), interp.capture(model, keep.entropy(), same_length):
        run(model)


def test_a_decoder_without_its_encoder_reads_its_prompts():
    torch.manual_seed(0)
    model = BartForCausalLM(BartConfig(**SHAPE, **IDS, is_decoder=True, is_encoder_decoder=False)).eval()
    prompts = interp.Prompts.from_ids(READ)
    with torch.no_grad(), interp.capture(model, keep.entropy(), prompts) as cap:
        model(**prompts.tensors())
    assert cap[keep.entropy()].shape == (2, 2, 4, 7)


def test_a_decoder_that_is_not_named_is_refused():
    model = made("bart")
    model.get_decoder = lambda: model
    with pytest.raises(ModelError, match=r"get_decoder\(\) does not return the decoder"):
        attention_layers(model)
