"""Which engine serves a call; what nobody would hand an engine on purpose is served, or refused in one sentence."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_calls import plain
from engines import NAMED

from interp.errors import UsageError
from interp.kernels import chunked, naive
from interp.kernels.contract import Call, Columns, Entropy, Lse, Mass, TopKeys
from interp.kernels.select import LONG, _warn, decide, obstacle, select


def single(**settings: Any) -> Call:
    """A call in float32."""
    call = plain(**({"n": 20, "before": 3} | settings))
    return replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float())


def keys(call: Call, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    return replace(call, k=change(call.k), v=change(call.v))


def poisoned() -> Call:
    live = torch.arange(23)[None] >= torch.tensor([[0], [9]])
    call = single(live=live, row_live=live[:, 3:])
    q = call.q.masked_fill(~live[:, None, 3:, None], torch.nan)
    return keys(replace(call, q=q), lambda x: x.masked_fill(~live[:, None, :, None], torch.nan))


SERVED: dict[str, Callable[[], Call]] = {
    "not contiguous": lambda: keys(single(), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "last axis with gaps": lambda: keys(single(), lambda x: x.repeat_interleave(2, -1)[..., ::2]),
    "expanded": lambda: keys(single(), lambda x: x[:1].expand(2, -1, -1, -1)),
    "not aligned": lambda: keys(single(), lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)),
    "more queries than keys": lambda: keys(single(q_start=-9), lambda x: x[:, :, :11]),
    "nan in padding": poisoned,
    "rows that see nothing": lambda: single(live=torch.zeros(2, 23, dtype=torch.bool)),
    "gradients that nobody wants": lambda: replace(single(), q=single().q.requires_grad_()),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", SERVED)
def test_odd_calls_are_served(tiny16, name):
    call = SERVED[name]()
    requests = (Lse(), Entropy(), TopKeys(1), Mass(torch.rand(2, 2, call.sizes[4])), Columns())
    with torch.no_grad():
        choice = select(call, requests, force="triton")
        found = choice.engine(call, requests)
        dead = [x if x is None else ~x for x in (call.row_live, call.live)]
        clean = [x if hide is None else x.masked_fill(hide[:, None, :, None], 0.0)
                 for x, hide in ((call.q, dead[0]), (call.k, dead[1]), (call.v, dead[1]))]  # fmt: skip
        exact = replace(call, q=clean[0].double(), k=clean[1].double(), v=clean[2].double())
        judge = naive.attend(exact, requests)
    NAMED["triton"].close((judge.out, *judge.values), (found.out, *found.values), name)


REFUSED: dict[str, tuple[Callable[[], Call], str]] = {
    "no queries": (lambda: replace(single(), q=single().q[:, :, :0]), "it has no queries or no keys"),
    "no keys": (lambda: keys(single(), lambda x: x[:, :, :0]), "it has no queries or no keys"),
    "no prompts": (lambda: single(b=0), "it has no queries or no keys"),
    "a mask of four axes": (lambda: single(mask=torch.ones(1, 1, 20, 23, dtype=torch.bool)), "its mask has four axes"),
    "wide heads": (lambda: single(d=257, n=3), "heads are 257 wide, wider than 256"),
    "wide values": (lambda: single(e=300, n=3), "heads are 300 wide, wider than 256"),
    "float64": (plain, "torch.float64 is not float16, bfloat16 or float32"),
    "two dtypes": (lambda: replace(single(), q=single().q.half()), "q, k and v differ in dtype"),
    "negative scale": (lambda: replace(single(), scale=-0.5), "its scale is not positive"),
    "gradients": (lambda: replace(single(), q=single().q.requires_grad_()), "gradients must flow through it"),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_serve_goes_elsewhere_with_the_reason(name):
    make, reason = REFUSED[name]
    call = make()
    with pytest.raises(UsageError, match=f"cannot serve this call: {reason}; leave engine out to use another"):
        select(call, force="triton")
    choice, _ = decide("cuda", obstacle(call), call.sizes[4])
    assert choice.engine is chunked.attend
    assert str(choice).endswith(reason)
    requests = (Lse(), TopKeys(2))
    found = choice.engine(call, requests)
    judge = naive.attend(replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double()), requests)
    NAMED["chunked"].close((judge.out, *judge.values), (found.out, *found.values), name, 5e-3)


def test_long_calls_that_a_gpu_does_not_serve_are_slow():
    assert not decide("cuda", None, LONG)[1]
    assert decide("cuda", "its mask has four axes", LONG)[1]
    assert not decide("cuda", "its mask has four axes", LONG - 1)[1]
    assert not decide("cpu", "its mask has four axes", LONG)[1]
    assert decide("cuda", None, 1)[0].name == "triton"
    assert decide("cpu", None, LONG)[0].name == "chunked"


def test_each_reason_is_warned_of_once():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for reason in ("one of these tests", "one of these tests", "another"):
            _warn(reason)
    assert [str(w.message).rsplit(": ")[-1] for w in seen] == ["one of these tests.", "another."]


def test_select_says_why_and_can_be_forced():
    call = plain()
    assert "memory" in str(select(call))
    assert select(call, force="naive").name == "naive"
    with pytest.raises(UsageError, match="engine 'fast' does not exist: take one of"):
        select(call, force="fast")


def test_a_cpu_is_no_gpu():
    code = (
        "import torch; from interp.kernels.contract import Call; from interp.kernels.select import obstacle\n"
        "q = torch.ones(1, 1, 2, 16); print(obstacle(Call(q, q, q, 1.0)))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.strip() == "it lies on the cpu, and they run on a GPU"


def test_row_coefficients_need_groups():
    call = single(row_coef=torch.zeros(2, 2, 20, 1))
    for engine in NAMED.values():
        with pytest.raises(UsageError, match="row_coef was given without key_group: name the group of each key"):
            engine.attend(call)


def test_shapes_that_do_not_fit():
    q = torch.zeros(1, 3, 2, 4)
    with pytest.raises(UsageError, match="do not fit together"):
        Call(q, q[:, :2], q[:, :2], 1.0)
