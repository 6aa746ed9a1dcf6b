"""Attentions that transformers collects from edited layers, and its ways of generating, inside of contexts."""

from typing import Any

import pytest
import torch
from context_cases import EDITS, made

import interp
from interp import ablate, capture, keep, steer, steering
from interp.analyses.kv import SnapKV
from interp.errors import SpanError, UsageError
from interp.testing import families

PROMPTS = interp.Prompts.from_ids(
    [[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10], [11, 12, 13, 11, 12, 13, 11]], spans=[{"s": (1, 3)}] * 2
)
INPUTS = PROMPTS.tensors()
ATTENTION_EDITS = {
    "zero tuning": lambda model: steering(model, steer.ZeroTuning(0.2, heads="L0H*"), PROMPTS),
    "boost": lambda model: steering(model, steer.Boost("s", 3.0, heads="L1H*"), PROMPTS),
    "all layers": lambda model: steering(model, steer.Temperature(0.5), PROMPTS),
    "row bias": lambda model: steering(model, steer.Pasta("s", alpha=0.01, heads="L0H1, L1H0"), PROMPTS),
    "uniform": lambda model: ablate(model, "L0H1", "uniform"),
    "first": lambda model: ablate(model, "L1H0 L1H2", "first"),
    "gate": lambda model: steering(model, steer.Gate(0.0, heads="L0H1"), PROMPTS),
    "zero": lambda model: ablate(model, "L0H1", "zero"),
}


def eager(name) -> Any:
    model = families.make(name)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gpt_oss"])
def test_attentions_of_edited_layers_are_those_of_the_edit(name):
    model = eager(name)
    with torch.no_grad():
        plain = model(**INPUTS, output_attentions=True).attentions
        for kind, context in ATTENTION_EDITS.items():
            with context(model):
                with capture(model, keep.pattern(), PROMPTS) as cap:
                    model(**INPUTS, use_cache=False)
                collected = model(**INPUTS, output_attentions=True)
                found = collected.attentions
                torch.testing.assert_close(collected.logits, model(**INPUTS).logits)
                with capture(model, keep.entropy(), PROMPTS):
                    both = model(**INPUTS, output_attentions=True).attentions
            assert [x.shape for x in found] == [x.shape for x in plain], kind
            for layer, weights in enumerate(found):
                torch.testing.assert_close(both[layer], weights)
                for row, length in enumerate(PROMPTS.lengths):
                    right = cap[keep.pattern()][row, layer, :, :length, :length]
                    torch.testing.assert_close(
                        weights[row, :, -length:, -length:], right, atol=1e-5, rtol=1e-4, msg=f"{kind}, layer {layer}"
                    )


def test_attentions_of_generated_tokens_cover_the_cache():
    model = eager("llama")
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with ATTENTION_EDITS["zero tuning"](model):
        found = model.generate(**INPUTS, **how, output_attentions=True)
        for cache in ("static", "dynamic"):
            other = model.generate(**INPUTS, **how, output_attentions=True, cache_implementation=cache)
            for one, two in zip(found.attentions, other.attentions, strict=True):
                assert len(one) == len(two) == 2
                for a, b in zip(one, two, strict=True):
                    torch.testing.assert_close(a[:, :, -1], b[:, :, -1, : a.shape[-1]])
    assert [step[0].shape[-1] for step in found.attentions] == [12, 13, 14]


def test_gradients_flow_through_collected_attentions():
    model = eager("llama")
    with ATTENTION_EDITS["all layers"](model):
        model(**INPUTS, output_attentions=True).attentions[1][..., 0].sum().backward()
    assert float(model.model.layers[0].self_attn.v_proj.weight.grad.abs().sum()) > 0


def test_attentions_that_may_be_collected_from_elsewhere_are_refused():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def own(module, *args, **kw):
        return sdpa_attention_forward(module, *args, **kw)[0], torch.ones(1)

    AttentionInterface.register("own", own)
    AttentionMaskInterface.register("own", sdpa_mask)
    try:
        model = made()
        model.set_attn_implementation("own")
        with torch.no_grad(), ATTENTION_EDITS["boost"](model):
            model(**INPUTS)
            with pytest.raises(UsageError, match="attention implementation 'own'"):
                model(**INPUTS, output_attentions=True)
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            del interface._global_mapping["own"]


def generated(model, prompts, context, **how):
    with context(model):
        return model.generate(**prompts.tensors(), max_new_tokens=8, do_sample=False, pad_token_id=0, **how).tolist()


ONE = interp.Prompts.from_ids([[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10]], spans=[{"s": (1, 3)}])
STEERED = {
    "boost": lambda model: steering(model, steer.Boost("s", 4.0), ONE),
    "pasta": lambda model: steering(model, steer.Pasta("s", alpha=0.01), ONE),
    "offset": lambda model: steering(model, steer.Offset({"L0H1": [2.0] * 16}), ONE),
    "zero": EDITS["zero"],
    "first": EDITS["first"],
    "mean": EDITS["mean"],
    "resample": EDITS["resample"],
    "selector": lambda model: steering(model, SnapKV(0.5, n_sink=1, n_recent=2, window=4), ONE),
}


@pytest.mark.parametrize("name", STEERED)
def test_every_way_of_generating_writes_the_same_steered_text(name):
    model, assistant = made(), families.make("llama", layers=1)
    for each in (model, assistant):
        each.generation_config.eos_token_id = None
    right = generated(model, ONE, STEERED[name])
    assert generated(model, ONE, STEERED[name], use_cache=False) == right
    assert generated(model, ONE, STEERED[name], prompt_lookup_num_tokens=3) == right
    assert generated(model, ONE, STEERED[name], assistant_model=assistant) == right
    assert generated(model, ONE, STEERED[name], cache_implementation="static") == right


def test_a_longer_batch_that_does_not_begin_with_the_prompts_is_refused():
    model = made()
    other = torch.tensor([[6, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 4]])
    for inputs in ({"input_ids": other}, {"inputs_embeds": model.get_input_embeddings()(other)}):
        context = STEERED["boost"](model)
        with torch.no_grad(), pytest.raises(SpanError, match="rows of"), context:
            model(**inputs)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"use_cache": False}, "use_cache=True, because generation without a cache reads the prompt anew"),
        ({"prompt_lookup_num_tokens": 3}, "without an assistant and without prompt_lookup_num_tokens"),
    ],
)
def test_a_capture_names_the_way_of_generating_that_it_cannot_read(how, text):
    model: Any = made()
    with pytest.raises(UsageError, match=text), capture(model, keep.entropy(), ONE):
        model.generate(**ONE.tensors(), max_new_tokens=8, do_sample=False, pad_token_id=0, **how)
