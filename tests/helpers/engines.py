"""The engines under test, and how near two results are."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from interp.kernels import chunked, naive
from interp.kernels.contract import Call, Engine


@dataclass(frozen=True)
class Under:
    """One engine and what it is held to."""

    name: str
    attend: Engine
    dtype: torch.dtype
    """of q, k and v"""
    atol: float
    """absolute, and relative to values above 1"""
    torch_only: bool = True
    """plain torch, which takes masks of four axes and carries gradients"""

    def takes(self, call: Call) -> Call:
        """The call in this engine's dtype, less what it does not serve."""
        call = call if self.torch_only else replace(call, mask=None)
        return replace(call, q=call.q.to(self.dtype), k=call.k.to(self.dtype), v=call.v.to(self.dtype))

    def close(self, expected: Any, found: Any, what: str, atol: float | None = None) -> None:
        """Fails where a result is not that of the specification, with nan or in another shape."""
        if isinstance(expected, tuple):
            for i, (one, other) in enumerate(zip(expected, found, strict=True)):
                self.close(one, other, f"{what}[{i}]", atol)
        elif isinstance(expected, int):
            assert expected == found, what
        else:
            assert expected.shape == found.shape, what
            assert not found.isnan().any(), f"{what} has nan"
            tol = self.atol if atol is None else atol
            found = found.cpu().double()
            torch.testing.assert_close(found, expected.cpu().double(), atol=tol, rtol=tol, msg=lambda m: f"{what}: {m}")


ENGINES = [
    Under("naive", naive.attend, torch.float64, 1e-9),
    Under("chunked", chunked.attend, torch.float64, 1e-9),
]
if find_spec("triton"):
    from interp.kernels.gpu import engine as fused

    ENGINES.append(Under("triton", fused.attend, torch.float32, 2e-5, torch_only=False))

NAMED = {engine.name: engine for engine in ENGINES}


def rows(*but: str) -> list[Any]:
    """A parameter for each engine but those that are named."""
    marks = {"triton": [pytest.mark.interpreter]}
    return [pytest.param(e, id=e.name, marks=marks.get(e.name, [])) for e in ENGINES if e.name not in but]
