"""How contexts open, act and close: on compiled models, in threads and tasks, under Ctrl-C, on copies."""

import asyncio
import contextlib
import copy
import gc
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from context_cases import BATCH, EDITS, READERS, logits, made

import interp
from interp import capture, keep
from interp.errors import ModelError, UsageError
from interp.hooks.edit.ablation import ablate
from interp.hooks.edit.head_gate_gradient import gate_gradient
from interp.hooks.edit.partial_forward import record_hidden_states, resume_from_layer


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_layers(model):
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_around(model):
    return torch.compile(lambda **inputs: model(**inputs), backend="eager")


WAYS = [compiled_whole, compiled_in_place, compiled_layers, compiled_forward, compiled_around]


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_edited_as_the_model(way):
    model = made()
    plain = logits(model)
    right = {}
    for name, context in EDITS.items():
        with context(model):
            right[name] = logits(model)
        assert not torch.allclose(right[name], plain, atol=1e-3), name
    run = way(model)
    torch.testing.assert_close(logits(run), plain)
    given = run if isinstance(run, torch.nn.Module) else model
    for name, context in EDITS.items():
        with context(given):
            torch.testing.assert_close(logits(run), right[name], msg=f"{name}, {way.__name__}")
            with capture(model, keep.entropy()) as cap:
                torch.testing.assert_close(logits(run), right[name], msg=f"{name} inside of a capture")
        assert cap[keep.entropy()].shape[:3] == (2, 2, 4)
        torch.testing.assert_close(logits(run), plain, msg=f"after {name}, {way.__name__}")


@pytest.mark.parametrize("way", WAYS)
def test_a_model_whose_first_run_is_inside_a_context_is_itself_after_it(way):
    model = made()
    plain = logits(model)
    run = way(model)
    with EDITS["gate"](model):
        inside = logits(run)
    assert not torch.allclose(inside, plain, atol=1e-3)
    torch.testing.assert_close(logits(run), plain)


def test_what_is_read_of_a_compiled_model_is_what_is_read_of_the_model():
    model = made()
    run = compiled_whole(model)
    logits(run)
    for item in (keep.z(), keep.entropy(), keep.q()):
        with capture(model, item, BATCH) as right:
            logits(model)
        with capture(model, item, BATCH) as found:
            logits(run)
        torch.testing.assert_close(found[item], right[item], equal_nan=True)
    with record_hidden_states(model) as hidden:
        logits(run)
    with resume_from_layer(model, 1, hidden[1] + 1):
        assert not torch.allclose(logits(run), logits(made()), atol=1e-3)
    with gate_gradient(model) as right:
        model(**BATCH.tensors(), labels=BATCH.tensors()["input_ids"], use_cache=False).loss.backward()
    with gate_gradient(model) as found:
        run(**BATCH.tensors(), labels=BATCH.tensors()["input_ids"], use_cache=False).loss.backward()
    torch.testing.assert_close(found.gradient, right.gradient)


def test_a_stance_of_the_user_is_kept():
    from torch._dynamo import eval_frame

    model = made()
    with torch.compiler.set_stance("fail_on_recompile"):
        with EDITS["zero"](model), EDITS["boost"](model):
            assert eval_frame._stance.stance == "force_eager"
            logits(compiled_whole(model))
        assert eval_frame._stance.stance == "fail_on_recompile"
    assert eval_frame._stance.stance == "default"


def test_a_context_inside_a_compiled_function_is_refused():
    model = made()

    def edited(ids):
        with ablate(model, "L0H1", "zero"):
            return model(ids).logits

    with torch.no_grad(), pytest.raises(UsageError, match=r"opened inside a function that torch\.compile"):
        torch.compile(edited, backend="eager")(BATCH.tensors()["input_ids"])


class Traced:
    """A model that runs where no hook is called, as an exported graph does."""

    def __init__(self, model):
        self.twin = copy.deepcopy(model)

    def __call__(self, **inputs):
        return self.twin(**inputs)


@pytest.mark.parametrize("name", EDITS)
def test_a_context_that_did_not_act_is_an_error(name):
    model = made()
    elsewhere = Traced(model)
    with (
        pytest.raises(ModelError, match=r"layers \[0, 1\]: the model did not run inside the context"),
        EDITS[name](model),
    ):
        logits(elsewhere)
    with pytest.raises(KeyError), EDITS[name](model):
        raise KeyError
    with EDITS[name](model):
        logits(model)


def test_a_context_that_acted_on_some_layers_alone_is_an_error():
    model = made()
    with record_hidden_states(model) as hidden:
        logits(model)
    for name in ("zero", "gate", "boost"):
        context = EDITS[name](model)
        with pytest.raises(ModelError, match=r"layers \[0\]"), context, resume_from_layer(model, 1, hidden[1]):
            logits(model)


def test_hooks_are_registered_in_one_place_alone():
    root = Path(interp.__file__).parent
    hook = re.compile(r"register_(module_)?(full_)?(forward|backward)|__dict__\[.forward")
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if hook.search(path.read_text("utf-8"))}
    assert found == {"hooks/model/scope.py"}


def test_another_thread_runs_the_plain_model():
    model = made()
    plain = logits(model)
    stop = threading.Event()
    wrong, right = [], {}
    for name, context in EDITS.items():
        with context(model):
            right[name] = logits(model)

    def run_plain():
        while not stop.is_set():
            wrong.append(not torch.allclose(logits(model), plain, atol=1e-4))

    thread = threading.Thread(target=run_plain)
    thread.start()
    try:
        for _ in range(3):
            for name, context in EDITS.items():
                with context(model), capture(model, [keep.entropy(), keep.z()], BATCH) as cap:
                    torch.testing.assert_close(logits(model), right[name], msg=name)
                assert cap[keep.entropy()].shape == cap[keep.z()].shape[:4]
    finally:
        stop.set()
        thread.join()
    assert len(wrong) > 5
    assert not any(wrong)


def test_contexts_of_several_threads_act_apart():
    from transformers import LlamaForCausalLM

    config: Any = made().config
    torch.manual_seed(1)
    models = [LlamaForCausalLM(config).eval() for _ in range(2)]
    expected = {}
    for number, model in enumerate(models):
        for name in ("zero", "boost", "gate"):
            with EDITS[name](model):
                expected[number, name] = logits(model)
    plain = [logits(model) for model in models]
    failures = []

    def work(number, name):
        try:
            for _ in range(8):
                with EDITS[name](models[number]):
                    torch.testing.assert_close(logits(models[number]), expected[number, name])
                torch.testing.assert_close(logits(models[number]), plain[number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=place) for place in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert config._attn_implementation == "sdpa"
    assert not traces(models[0]) | traces(models[1])


def test_a_context_whose_model_ran_in_another_thread_is_an_error():
    model = made()
    for name in ("zero", "gate", "boost"):
        context = EDITS[name](model)
        with pytest.raises(ModelError, match="another thread or task ran the model"), context:  # noqa: PT012
            thread = threading.Thread(target=logits, args=(model,))
            thread.start()
            thread.join()


def test_tasks_have_contexts_of_their_own():
    model = made()
    plain = logits(model)
    with EDITS["zero"](model):
        zero = logits(model)

    async def steered(started, other):
        with EDITS["zero"](model):
            started.set()
            await other.wait()
            torch.testing.assert_close(logits(model), zero)
            # a thread and a task that copy the variables of this task
            torch.testing.assert_close(await asyncio.to_thread(logits, model), zero)
            torch.testing.assert_close(await asyncio.create_task(computed()), zero)

    async def computed():
        return logits(model)

    async def unsteered(started, other):
        await started.wait()
        found = logits(model)
        other.set()
        torch.testing.assert_close(found, plain)

    async def both():
        started, other = asyncio.Event(), asyncio.Event()
        await asyncio.gather(steered(started, other), unsteered(started, other))

    asyncio.run(both())
    # a context that is opened in one cell of a notebook acts in the next
    stack = contextlib.ExitStack()

    async def cell():
        stack.enter_context(EDITS["zero"](model))

    asyncio.run(cell())
    torch.testing.assert_close(logits(model), zero)
    stack.close()
    torch.testing.assert_close(logits(model), plain)


def traces(model):
    """Whatever contexts may have left on a model, or in the process."""
    from torch._dynamo import eval_frame
    from transformers import AttentionInterface, AttentionMaskInterface

    from interp.hooks import seam
    from interp.hooks.model import attention_names, scope

    found = {"hook" for m in model.modules() if m._forward_hooks or m._forward_pre_hooks}
    found |= {"forward" for m in model.modules() if "forward" in vars(m)}
    found |= {"name"} if type(model.config._attn_implementation) is not str else set()
    for interface in (AttentionInterface, AttentionMaskInterface):
        found |= {"function"} if "interp" in interface._global_mapping else set()
    found |= {"scope"} if scope._all_open else set()
    found |= {"seam"} if seam._seams or seam._owners or attention_names._patched else set()
    return found | ({"stance"} if eval_frame._stance.stance != "default" else set())


@pytest.mark.parametrize(
    "name", ["zero", "resample", "gate", "boost", "mix", "entropy", "z", "without rope", "checkpoints"]
)
def test_ctrl_c_while_a_context_opens_or_closes_leaves_nothing(name):
    model = made()
    context = (EDITS | READERS)[name]
    handler = signal.getsignal(signal.SIGINT)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    interrupted = 0
    inputs = BATCH.tensors()
    try:
        for step in range(150):
            try:
                try:
                    made_context = context(model)
                    signal.setitimer(signal.ITIMER_REAL, 2e-6 + step * 1e-5)
                    with made_context, torch.no_grad():
                        if step % 2:
                            model(**inputs)
                        signal.setitimer(signal.ITIMER_REAL, 2e-6 + step * 2e-6)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            except ModelError:
                # the model did not run
                pass
            del made_context
            assert not traces(model), step
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5


@pytest.mark.parametrize("name", [*EDITS, *READERS])
def test_a_context_that_is_dropped_closes_itself(name):
    model = made()
    plain = logits(model)
    context = (EDITS | READERS)[name](model)
    context.__enter__()
    assert traces(model)
    logits(model)
    del context
    gc.collect()
    assert not traces(model)
    torch.testing.assert_close(logits(model), plain)
