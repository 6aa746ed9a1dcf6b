"""Selection of engines, including unusual calls, which are served or rejected with a clear message."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_calls import causal_call
from engines import ENGINES_BY_NAME

from interp.errors import UsageError
from interp.kernels import chunked, naive
from interp.kernels.contract import Call, Columns, Entropy, Lse, Mass, TopKeys
from interp.kernels.select import MIN_KEYS_TO_WARN, _warn, decide, obstacle, select


def single(**settings: Any) -> Call:
    """Return a float32 call."""
    call = causal_call(**({"n": 20, "before": 3} | settings))
    return replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float())


def keys(call: Call, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    return replace(call, k=change(call.k), v=change(call.v))


def poisoned() -> Call:
    live = torch.arange(23)[None] >= torch.tensor([[0], [9]])
    call = single(live=live, row_live=live[:, 3:])
    q = call.q.masked_fill(~live[:, None, 3:, None], torch.nan)
    return keys(replace(call, q=q), lambda x: x.masked_fill(~live[:, None, :, None], torch.nan))


UNUSUAL_CALLS: dict[str, Callable[[], Call]] = {
    "not contiguous": lambda: keys(single(), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "last axis with gaps": lambda: keys(single(), lambda x: x.repeat_interleave(2, -1)[..., ::2]),
    "expanded": lambda: keys(single(), lambda x: x[:1].expand(2, -1, -1, -1)),
    "not aligned": lambda: keys(single(), lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)),
    "more queries than keys": lambda: keys(single(q_start=-9), lambda x: x[:, :, :11]),
    "nan in padding": poisoned,
    "rows that see nothing": lambda: single(live=torch.zeros(2, 23, dtype=torch.bool)),
    "unused gradients": lambda: replace(single(), q=single().q.requires_grad_()),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", UNUSUAL_CALLS)
def test_unusual_calls_are_served(tiny16, name):
    call = UNUSUAL_CALLS[name]()
    requests = (Lse(), Entropy(), TopKeys(1), Mass(torch.rand(2, 2, call.sizes[4])), Columns())
    with torch.no_grad():
        choice = select(call, requests, force="triton")
        found = choice.engine(call, requests)
        dead = [x if x is None else ~x for x in (call.row_live, call.live)]
        clean = [x if hide is None else x.masked_fill(hide[:, None, :, None], 0.0)
                 for x, hide in ((call.q, dead[0]), (call.k, dead[1]), (call.v, dead[1]))]  # fmt: skip
        exact = replace(call, q=clean[0].double(), k=clean[1].double(), v=clean[2].double())
        judge = naive.attend(exact, requests)
    ENGINES_BY_NAME["triton"].assert_close((judge.out, *judge.values), (found.out, *found.values), name)


UNSUPPORTED_CALLS: dict[str, tuple[Callable[[], Call], str]] = {
    "no queries": (lambda: replace(single(), q=single().q[:, :, :0]), "it has no queries or no keys"),
    "no keys": (lambda: keys(single(), lambda x: x[:, :, :0]), "it has no queries or no keys"),
    "no prompts": (lambda: single(b=0), "it has no queries or no keys"),
    "a mask of four axes": (lambda: single(mask=torch.ones(1, 1, 20, 23, dtype=torch.bool)), "its mask has four axes"),
    "wide heads": (lambda: single(d=257, n=3), "heads are 257 wide, wider than 256"),
    "wide values": (lambda: single(e=300, n=3), "heads are 300 wide, wider than 256"),
    "float64": (causal_call, "torch.float64 is not float16, bfloat16 or float32"),
    "two dtypes": (lambda: replace(single(), q=single().q.half()), "q, k and v differ in dtype"),
    "negative scale": (lambda: replace(single(), scale=-0.5), "its scale is not positive"),
    "gradients": (lambda: replace(single(), q=single().q.requires_grad_()), "gradients must flow through it"),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", UNSUPPORTED_CALLS)
def test_unsupported_calls_go_to_another_engine_with_the_reason(name):
    make, reason = UNSUPPORTED_CALLS[name]
    call = make()
    with pytest.raises(UsageError, match=f"cannot serve this call: {reason}; omit `engine` to use another"):
        select(call, force="triton")
    choice, _ = decide("cuda", obstacle(call), call.sizes[4])
    assert choice.engine is chunked.attend
    assert str(choice).endswith(reason)
    requests = (Lse(), TopKeys(2))
    found = choice.engine(call, requests)
    judge = naive.attend(replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double()), requests)
    ENGINES_BY_NAME["chunked"].assert_close((judge.out, *judge.values), (found.out, *found.values), name, 5e-3)


def test_long_unsupported_calls_on_a_gpu_are_slow():
    assert not decide("cuda", None, MIN_KEYS_TO_WARN)[1]
    assert decide("cuda", "its mask has four axes", MIN_KEYS_TO_WARN)[1]
    assert not decide("cuda", "its mask has four axes", MIN_KEYS_TO_WARN - 1)[1]
    assert not decide("cpu", "its mask has four axes", MIN_KEYS_TO_WARN)[1]
    assert decide("cuda", None, 1)[0].name == "triton"
    assert decide("cpu", None, MIN_KEYS_TO_WARN)[0].name == "chunked"


def test_each_reason_raises_one_warning():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for reason in ("one of these tests", "one of these tests", "another"):
            _warn(reason)
    assert [str(w.message).rsplit(": ")[-1] for w in seen] == ["one of these tests.", "another."]


def test_select_gives_a_reason_and_can_be_forced():
    call = causal_call()
    assert "memory" in str(select(call))
    assert select(call, force="naive").name == "naive"
    with pytest.raises(UsageError, match="unknown engine 'fast'; choose from 'naive', 'chunked', 'triton'"):
        select(call, force="fast")


def test_kernels_need_a_gpu():
    code = (
        "import torch; from interp.kernels.contract import Call; from interp.kernels.select import obstacle\n"
        "q = torch.ones(1, 1, 2, 16); print(obstacle(Call(q, q, q, 1.0)))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.strip() == "its tensors are on the cpu, and the kernels need a GPU"


def test_row_coefficients_need_groups():
    call = single(row_coef=torch.zeros(2, 2, 20, 1))
    for engine in ENGINES_BY_NAME.values():
        with pytest.raises(UsageError, match="row_coef was given without key_group; pass the group of each key"):
            engine.attend(call)


def test_shapes_that_do_not_match():
    q = torch.zeros(1, 3, 2, 4)
    with pytest.raises(UsageError, match="do not fit together"):
        Call(q, q[:, :2], q[:, :2], 1.0)
