"""Contexts by name: those that edit a tiny model and those that read it."""

import torch

import interp
from interp import capture, keep, steer, steering
from interp.hooks.edit.ablation import Intervention, ablate, intervene
from interp.hooks.edit.layer_checkpoints import layer_checkpoints
from interp.hooks.edit.partial_forward import record_hidden_states
from interp.hooks.edit.streaming_mix import streaming_mix
from interp.hooks.model.heads import HeadSet
from interp.hooks.transformerlens.without_rope import without_rope
from interp.testing import families

BATCH = interp.Prompts.from_ids([[5, 6, 7, 8, 9, 10, 11, 12], [9, 8, 7, 6, 5]], spans=[{"s": (1, 3)}] * 2)
REFERENCE = interp.Prompts.from_ids([[15, 16, 17, 18, 19, 20, 21, 22]])
VECTORS = {"L0H1": [0.5] * 16, "L1H2": [-0.5] * 16}

# what changes the logits of a model, by name
EDITS = {
    "zero": lambda model: ablate(model, "L0H1 L1H2", "zero"),
    "mean": lambda model: ablate(model, "L0H1 L1H2", "mean", reference=REFERENCE),
    "resample": lambda model: ablate(model, "L0H1 L1H2", "resample", reference=REFERENCE),
    "uniform": lambda model: ablate(model, "L0H1 L1H2", "uniform"),
    "first": lambda model: ablate(model, "L0H1 L1H2", "first"),
    "scale": lambda model: intervene(model, Intervention("scale", factor=3.0), [HeadSet.parse("L0H1 L1H2")]),
    "gate": lambda model: steering(model, steer.Gate(0.0, heads="L0H1 L1H2")),
    "offset of all": lambda model: steering(model, steer.Offset(VECTORS, at="all")),
    "offset of last": lambda model: steering(model, steer.Offset(VECTORS), BATCH),
    "boost": lambda model: steering(model, steer.Boost("s", 3.0), BATCH),
    "mix": lambda model: streaming_mix(model, torch.zeros(2, 2, device="cpu"), sink=1, recent=1),
}
# what changes nothing, by name
READERS = {
    "entropy": lambda model: capture(model, keep.entropy(), BATCH),
    "z": lambda model: capture(model, keep.z(), BATCH),
    "without rope": without_rope,
    "hidden states": record_hidden_states,
    "checkpoints": layer_checkpoints,
}


def made(name="llama"):
    """A new model, which a test may compile."""
    return families.make(name)


def logits(run, **more):
    with torch.no_grad():
        return run(**BATCH.tensors(), use_cache=False, **more).logits
