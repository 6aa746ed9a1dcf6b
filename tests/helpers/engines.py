"""The engines under test and their tolerances."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from interp.kernels import chunked, naive
from interp.kernels.contract import Call, Engine


@dataclass(frozen=True)
class EngineUnderTest:
    """One engine, with the dtype and the tolerance of its tests."""

    name: str
    attend: Engine
    dtype: torch.dtype
    """The dtype of q, k and v."""
    atol: float
    """Absolute tolerance, also used as relative tolerance."""
    torch_only: bool = True
    """Whether the engine is plain torch, which supports masks of four axes and gradients."""

    def adapt(self, call: Call) -> Call:
        """Return the call in the dtype of this engine, without a mask that the engine does not support."""
        call = call if self.torch_only else replace(call, mask=None)
        return replace(call, q=call.q.to(self.dtype), k=call.k.to(self.dtype), v=call.v.to(self.dtype))

    def assert_close(self, expected: Any, found: Any, what: str, atol: float | None = None) -> None:
        """Assert that a result equals that of the reference, has the same shape and has no NaN."""
        if isinstance(expected, tuple):
            for i, (one, other) in enumerate(zip(expected, found, strict=True)):
                self.assert_close(one, other, f"{what}[{i}]", atol)
        elif isinstance(expected, int):
            assert expected == found, what
        else:
            assert expected.shape == found.shape, what
            assert not found.isnan().any(), f"{what} has nan"
            tol = self.atol if atol is None else atol
            found = found.cpu().double()
            torch.testing.assert_close(found, expected.cpu().double(), atol=tol, rtol=tol, msg=lambda m: f"{what}: {m}")


ENGINES = [
    EngineUnderTest("naive", naive.attend, torch.float64, 1e-9),
    EngineUnderTest("chunked", chunked.attend, torch.float64, 1e-9),
]
if find_spec("triton"):
    from interp.kernels.gpu import engine as triton_engine

    ENGINES.append(EngineUnderTest("triton", triton_engine.attend, torch.float32, 2e-5, torch_only=False))

ENGINES_BY_NAME = {engine.name: engine for engine in ENGINES}


def engine_params(*exclude: str) -> list[Any]:
    """Return a test parameter for each engine except those in `exclude`."""
    marks = {"triton": [pytest.mark.interpreter]}
    return [pytest.param(e, id=e.name, marks=marks.get(e.name, [])) for e in ENGINES if e.name not in exclude]
