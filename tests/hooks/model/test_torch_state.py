"""What a caller has set in torch does not change what contexts read and edit, and copies carry no context."""

import contextlib
import copy
import io
from typing import Any

import pytest
import torch
from context_cases import BATCH, EDITS, READERS, logits, made

from interp import capture, keep, steer, steering
from interp.analyses.identify.sinks import sinks
from interp.errors import UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.model.torch_state import own_state

INPUTS = BATCH.tensors()
KEPT = [
    keep.entropy(),
    keep.mass("s"),
    keep.pattern(),
    keep.columns(),
    keep.lse(),
    keep.top_keys(2),
    keep.z(),
    keep.q(),
]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def fast_products():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def fast_products_by_backend():
    known: Any = torch.backends
    backends = known.cuda.matmul, known.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend, name in zip(backends, ("tf32", "bf16"), strict=True):
        backend.fp32_precision = name
    try:
        yield
        assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
    finally:
        for backend, name in zip(backends, before, strict=True):
            backend.fp32_precision = name


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
    "fast products": fast_products,
    "fast products by backend": fast_products_by_backend,
}


def run(model):
    with torch.no_grad():
        return model(**INPUTS, use_cache=False).logits


@pytest.mark.parametrize("state", STATES)
def test_what_is_read_is_the_same_in_every_state(state):
    model = made()
    with capture(model, KEPT, BATCH) as right:
        plain = run(model)
    with STATES[state]():
        with capture(model, KEPT, BATCH) as found:
            got = run(model)
        inside = [found[item] for item in KEPT]
    torch.testing.assert_close(got, plain)
    for item, early in zip(KEPT, inside, strict=True):
        for one, other, third in zip(*map(tensors, (right[item], found[item], early)), strict=True):
            torch.testing.assert_close(other, one, equal_nan=True)
            torch.testing.assert_close(third, one, equal_nan=True)
            assert not other.is_inference()


def tensors(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("state", STATES)
def test_edits_are_the_same_in_every_state(state):
    model = made()
    for name, context in EDITS.items():
        with context(model):
            right = run(model)
        with STATES[state](), context(model):
            found = run(model)
        torch.testing.assert_close(found, right, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("state", ["float64", "float16", "bfloat16", "another device"])
def test_analyses_are_the_same_with_every_default(state):
    model = made()
    right = sinks(model, BATCH)
    with STATES[state]():
        found = sinks(model, BATCH)
    torch.testing.assert_close(found.values, right.values, equal_nan=True)


@pytest.mark.parametrize("name", EDITS)
def test_a_run_with_gradients_follows_one_in_inference_mode(name):
    model = made()
    with EDITS[name](model):
        with torch.inference_mode():
            model(**INPUTS, use_cache=False)
        model(**INPUTS, use_cache=False).logits.square().mean().backward()
    found = model.model.layers[0].self_attn.v_proj.weight.grad.clone()
    model.zero_grad()
    with EDITS[name](model):
        if name == "resample":
            # the second draw of a context
            run(model)
        model(**INPUTS, use_cache=False).logits.square().mean().backward()
    torch.testing.assert_close(found, model.model.layers[0].self_attn.v_proj.weight.grad)


def test_autocast_reads_what_the_model_computes():
    model = made()
    with capture(model, KEPT, BATCH) as right:
        run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run(model)
        with capture(model, KEPT, BATCH) as found:
            got = run(model)
        for name, context in EDITS.items():
            with context(model):
                edited = run(model)
            with torch.autocast("cpu", enabled=False), context(model):
                exact = run(model)
            size = exact.abs().max()
            assert (edited.float() - exact).abs().max() < 0.05 * size, name
    assert got.dtype == plain.dtype
    assert (got - plain).abs().max() < 0.02 * plain.abs().max()
    for item in KEPT[:5]:
        torch.testing.assert_close(found[item], right[item], atol=0.05, rtol=0.05, equal_nan=True)
    # weights are summed in float32
    rows = found[keep.pattern()].nan_to_num().sum(-1)
    torch.testing.assert_close(rows[0], torch.ones_like(rows[0]), atol=1e-5, rtol=0)


def test_the_state_of_the_caller_comes_back():
    with default_dtype(torch.float64), torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"):
        with pytest.raises(KeyError), own_state():  # noqa: PT012
            assert torch.ones(1).dtype == torch.float32
            assert torch.ones(1).device.type == "cpu"
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            raise KeyError
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device().type == "meta"
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")


def gradients(model, name):
    model.zero_grad()
    with EDITS[name](model), capture(model, [keep.entropy(), keep.z()], BATCH) as cap:
        model(**INPUTS, labels=INPUTS["input_ids"], use_cache=False).loss.backward()
    return {key: weight.grad.clone() for key, weight in model.named_parameters()}, cap


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_edits_and_reads_once(reentrant):
    for name in EDITS:
        model = made().train()
        right, plain = gradients(model, name)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found, cap = gradients(model, name)
        for key, value in right.items():
            torch.testing.assert_close(found[key], value, msg=f"{name}, {key}")
        torch.testing.assert_close(cap[keep.entropy()], plain[keep.entropy()], equal_nan=True)
        torch.testing.assert_close(cap[keep.z()], plain[keep.z()], equal_nan=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_backward_pass_after_an_edit_is_refused(reentrant):
    model = made().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name in ("zero", "gate", "boost", "uniform", "mix"):
        with EDITS[name](model):
            loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
        with pytest.raises(UsageError, match=r"call backward\(\) inside the context"):
            loss.backward()
    # reading changes nothing
    with capture(model, keep.entropy(), BATCH):
        loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
    loss.backward()


@pytest.mark.parametrize("name", [*EDITS, *READERS])
def test_a_copy_made_inside_a_context_is_the_plain_model(name, tmp_path):
    model = made()
    plain = logits(model)
    stored = io.BytesIO()
    refused = name in ("without rope", "hidden states", "checkpoints")
    with (EDITS | READERS)[name](model):
        run(model)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(logits(twin), plain)
        assert twin.config._attn_implementation == copy.deepcopy(model.config)._attn_implementation == "sdpa"
        model.save_pretrained(tmp_path)
        assert "interp" not in (tmp_path / "config.json").read_text()
        if refused:
            with pytest.raises(UsageError, match="close it before saving the model"):
                torch.save(model, stored)
        else:
            torch.save(model, stored)
    torch.testing.assert_close(logits(twin), plain)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path).eval()), plain)
    if not refused:
        stored.seek(0)
        loaded = torch.load(stored, weights_only=False)
        torch.testing.assert_close(logits(loaded), plain)
        assert loaded.config._attn_implementation == "sdpa"
    with ablate(twin, "L0H1", "zero"), steering(twin, steer.Temperature(0.5)):
        assert not torch.allclose(logits(twin), plain, atol=1e-3)
    torch.testing.assert_close(logits(model), plain)
