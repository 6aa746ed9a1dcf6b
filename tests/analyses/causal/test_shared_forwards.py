"""Shared forward passes: equal to whole ones in every family, and no layer below the first ablated one runs."""

from typing import Any

import pytest
import torch
from detectors import random_prompts

from interp.analyses.causal.ablation_test import generate_ablated
from interp.analyses.causal.curve import causal_curve
from interp.analyses.causal.shared_forwards import SharedForwards
from interp.analyses.measures.losses import token_losses
from interp.hooks.edit.ablation import ablate
from interp.hooks.edit.partial_forward import decoder_layers
from interp.hooks.model.heads import HeadSet
from interp.testing import families

LATE = HeadSet.parse("L1H0, L1H2")
EARLY = HeadSet.parse("L0H1, L1H2")


def measures(model: Any, prompts: Any) -> dict[str, Any]:
    """What a control measures: a loss without a cache, and replies with one."""
    return {
        "loss": lambda heads: _loss(model, prompts, heads),
        "replies": lambda heads: generate_ablated(model, prompts, heads, "zero", 4, batch_size=2),
    }


def _loss(model: Any, prompts: Any, heads: HeadSet) -> list[float]:
    with ablate(model, heads, "zero"):
        return token_losses(model, prompts, batch_size=2).tolist()


def layer_runs(model: Any) -> tuple[list[int], list[Any]]:
    """The numbers of the attention modules that run, and the handles that stop counting."""
    from interp.hooks.model.layers import attention_layers

    found: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, layer=layer: found.append(layer))
        for layer, module in attention_layers(model).items()
    ]
    return found, handles


@pytest.mark.parametrize("measure", ["loss", "replies"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_resumed_measure_is_the_whole_one(tiny_model, name, measure):
    model = tiny_model(name)
    prompts = random_prompts("text", families.VOCAB, (20, 13, 17))
    take = measures(model, prompts)[measure]
    shared = SharedForwards.of(model, [LATE])
    with shared.record():
        base = take(HeadSet(()))
    for heads in (LATE, HeadSet.parse("L1H1"), EARLY, HeadSet(())):
        with shared.resume(heads):
            assert take(heads) == take(heads)
            resumed = take(heads)
        assert resumed == (base if not len(heads) else take(heads)), str(heads)
    assert take(HeadSet(())) == base


def test_layers_below_the_first_ablated_one_do_not_run(tiny_model):
    model = tiny_model("llama")
    prompts = random_prompts("text", families.VOCAB, (20, 13, 17))
    shared = SharedForwards.of(model, [LATE])
    with shared.record():
        _loss(model, prompts, HeadSet(()))
    for heads, wanted in ((LATE, {1}), (EARLY, {0, 1})):
        found, handles = layer_runs(model)
        with shared.resume(heads):
            _loss(model, prompts, heads)
        for handle in handles:
            handle.remove()
        assert set(found) == wanted
    # other inputs than the recorded ones run whole
    found, handles = layer_runs(model)
    other = random_prompts("text", families.VOCAB, (21, 14))
    with shared.resume(LATE):
        _loss(model, other, LATE)
    for handle in handles:
        handle.remove()
    assert set(found) == {0, 1}


def test_a_curve_begins_at_the_first_ablated_layer(tiny_model):
    model = tiny_model("llama")
    prompts = random_prompts("text", families.VOCAB, (20, 13, 17))
    found, handles = layer_runs(model)
    causal_curve(
        model, {"late": list(LATE)}, {"loss": lambda model: token_losses(model, prompts)}, sizes=(2,), n_random_sets=2
    )
    for handle in handles:
        handle.remove()
    # one baseline; sets drawn freely may begin at layer 0
    assert found.count(0) < found.count(1)


def test_an_error_leaves_no_hook_and_no_replaced_forward(tiny_model):
    model = tiny_model("llama")
    prompts = random_prompts("text", families.VOCAB, (20, 13))
    shared = SharedForwards.of(model, [LATE])
    before = _loss(model, prompts, HeadSet(()))
    with shared.record():
        _loss(model, prompts, HeadSet(()))

    def fail(*_: Any) -> None:
        raise ValueError("stop")

    handle = decoder_layers(model)[1].register_forward_hook(fail)
    with pytest.raises(ValueError, match="stop"), shared.resume(LATE):
        _loss(model, prompts, LATE)
    handle.remove()
    assert _loss(model, prompts, HeadSet(())) == before
    assert not any("forward" in vars(block) for block in decoder_layers(model).values())
    assert not model._forward_hooks
    assert torch.equal(torch.tensor(before), torch.tensor(_loss(model, prompts, HeadSet(()))))
