"""NaN in a model is an error that names the layer and the dtype, and NaN in padding changes nothing."""

from typing import Any

import pytest
import torch
from detectors import METHODS, random_prompts

import interp
from interp.analyses.kv.kv_curve import kv_curve
from interp.analyses.kv.kv_tasks import KVTask
from interp.analyses.kv.random_keys import RandomKeys
from interp.analyses.measures import losses
from interp.analyses.measures.answer_logits import logit_differences
from interp.errors import ModelError
from interp.hooks.edit.edit import steering
from interp.hooks.generate import generate
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import run
from interp.testing import families

LAYER_1 = r"layer 1 is NaN or infinite in float32|NaN or infinite.*layer 1 in float32"


def broken(layer: int = 1, where: str = "k", value: float = float("nan"), dtype: Any = torch.float32) -> Any:
    """A model whose attention is NaN or infinite in one layer, or whose unembedding is."""
    model = families.make("llama").to(dtype)
    block = model.model.layers[layer].self_attn
    weight = {"k": block.k_proj, "v": block.v_proj, "o": block.o_proj, "head": model.lm_head}[where].weight
    with torch.no_grad():
        weight[0, 0] = value
    return model


def prompts(n: int = 2) -> Prompts:
    rng = torch.Generator().manual_seed(1)
    ids = [[1, *torch.randint(5, 60, (12 + 3 * i,), generator=rng).tolist()] for i in range(n)]
    meta = [{"right": [[7]], "wrong": [[8]]}] * n
    return Prompts.from_ids(ids, spans=[{"mark": (3, 6), "other": (8, 10)}] * n, meta=meta)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_detector_scores_a_model_that_computes_nan(method, value):
    batch = random_prompts(method.kind, families.VOCAB, (24, 40))
    with pytest.raises(ModelError, match=LAYER_1):
        method.run(broken(value=value), batch, batch_size=2)


def captured(model: Any, batch: Prompts, *keep: Any, **choice: Any) -> None:
    with torch.no_grad(), interp.capture(model, keep, batch, **choice):
        model(**batch.tensors())


def ablated(model: Any, batch: Prompts) -> None:
    with interp.ablate(model, interp.HeadSet.parse("L0H0"), "zero"):
        run(model, batch)


KEEP = interp.keep
READ = {
    "mass": lambda m, b: captured(m, b, KEEP.mass("mark")),
    "entropy": lambda m, b: captured(m, b, KEEP.entropy()),
    "top keys": lambda m, b: captured(m, b, KEEP.top_keys(3)),
    "top key": lambda m, b: captured(m, b, KEEP.top_keys(1)),
    "columns": lambda m, b: captured(m, b, KEEP.columns()),
    "lse": lambda m, b: captured(m, b, KEEP.lse()),
    "blocks": lambda m, b: captured(m, b, KEEP.blocks(4)),
    "some heads": lambda m, b: captured(m, b, KEEP.entropy(), heads="L1H0"),
    "one query": lambda m, b: captured(m, b, KEEP.mass("mark"), queries=12),
    "run": run,
    "losses": losses.token_losses,
    "answers": logit_differences,
    "replies": lambda m, b: generate(m, b, max_new_tokens=3),
    "an ablation": ablated,
    "a curve of keys": lambda m, b: kv_curve(
        m, [KVTask.cut("made", b, [9, 9], [[7], [8]])], {"random": RandomKeys}, keep_ratios=(0.5,)
    ),
}
EDITS = {
    "spotlight": interp.steer.SpotLight("mark", 0.5),
    "act": interp.steer.Act(0.4, 0.05),
    "redistribute": interp.steer.Redistribute("mark", 0.4, sinks=0),
}


WITHOUT_READING = ("run", "losses", "answers", "replies", "an ablation", "a curve of keys")


@pytest.mark.parametrize("name", READ)
def test_nan_in_a_row_that_is_read_is_an_error(name):
    # torch's attention may turn a row of NaN into zeros, so the output is broken where no attention is read
    model = broken(where="o") if name in WITHOUT_READING else broken()
    with pytest.raises(ModelError, match=LAYER_1):
        READ[name](model, prompts())


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_reads_nan_is_an_error(name):
    batch = prompts()
    model = broken()
    expected = "the attention of layer 1 is NaN or infinite in float32"
    with pytest.raises(ModelError, match=expected), torch.no_grad(), steering(model, EDITS[name], batch):
        model(**batch.tensors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_and_the_dtype_are_named(layer, dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=f"attention of layer {layer} is NaN or infinite in {name}; load the model in"):
        captured(broken(layer, dtype=dtype), prompts(), KEEP.entropy())
    with pytest.raises(ModelError, match=f"so is the attention of layer {layer} in {name}"):
        run(broken(layer, "o", dtype=dtype), prompts())
    with pytest.raises(ModelError, match=f"NaN or infinite in {name}, after the last attention layer"):
        run(broken(layer, "head", dtype=dtype), prompts())


def test_a_float16_model_that_overflows_is_named():
    model = families.make("llama").half()
    with torch.no_grad():
        for projection in (model.model.layers[0].self_attn.v_proj, model.model.layers[0].self_attn.o_proj):
            projection.weight.mul_(1e4)
    with pytest.raises(ModelError, match=r"NaN or infinite.*float16; load the model in bfloat16 or float32"):
        run(model, prompts())


@pytest.mark.parametrize("name", [name for name in READ if name != "a curve of keys"])
def test_a_finite_model_is_read_as_before(name):
    READ[name](families.make("llama"), prompts())
