"""Which engine serves an attention call, and why."""

import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch

from interp.errors import UsageError
from interp.kernels import chunked, naive
from interp.kernels.contract import Call, Engine, Request

Name = Literal["naive", "chunked", "triton"]

NAMES: tuple[Name, ...] = ("naive", "chunked", "triton")
WIDEST = 256
"""head width up to which the Triton kernels go"""
LONG = 4096
"""keys from which on plain torch in place of the kernels is worth a warning"""


@dataclass(frozen=True)
class Choice:
    """An engine's name and the reason for it, in words."""

    name: str
    why: str

    @property
    def engine(self) -> Engine:
        if self.name == "triton":
            # imports triton, which not every machine has
            from interp.kernels.gpu import engine as fused

            return fused.attend
        return {"naive": naive.attend, "chunked": chunked.attend}[self.name]

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def select(call: Call, requests: tuple[Request, ...] = (), force: str | None = None) -> Choice:
    """The engine for one call: "triton" on a GPU wherever the kernels can serve it, else "chunked".

    `force` names it: "naive", "chunked" or "triton". A long call on a GPU that the kernels cannot serve is warned of,
    once for each reason, since plain torch is more than twice as slow there.
    Raises UsageError for an engine that does not exist, or a forced one that cannot serve the call.
    """
    if force is not None and force not in NAMES:
        raise UsageError(f"engine {force!r} does not exist: take one of {', '.join(NAMES)}.")
    against = obstacle(call)
    if force == "triton":
        if against is not None:
            raise UsageError(f"the Triton kernels cannot serve this call: {against}; leave engine out to use another.")
        return Choice(force, "named by the caller")
    if force is not None:
        return Choice(force, "named by the caller")
    choice, slow = decide(call.q.device.type, against, call.sizes[4])
    if slow:
        _warn(str(against))
    return choice


def decide(device: str, against: str | None, keys: int) -> tuple[Choice, bool]:
    """The engine for a call on a type of device with an obstacle or none, and whether it is slow for so many keys."""
    if device == "cuda" and against is None:
        return Choice("triton", "one pass on the GPU gives the output and its reductions"), False
    reason = f"; the Triton kernels do not serve it: {against}" if device == "cuda" else ""
    choice = Choice("chunked", f"plain torch on {device}, memory in proportion to the length{reason}")
    return choice, device == "cuda" and keys >= LONG


def usual(device: torch.device) -> str:
    """The engine that serves an ordinary call on a device."""
    return "triton" if device.type == "cuda" and _installed() else "chunked"


def obstacle(call: Call) -> str | None:
    """Why the Triton kernels cannot serve a call, in words; None where they can."""
    width = max(call.q.shape[-1], call.v.shape[-1])
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
    reasons = {
        "triton is not installed": not _installed(),
        f"it lies on the {call.q.device.type}, and they run on a GPU": not _runs_on(call.q.device),
        f"{call.q.dtype} is not float16, bfloat16 or float32": call.q.dtype
        not in (torch.float16, torch.bfloat16, torch.float32),
        "q, k and v differ in dtype": not call.q.dtype == call.k.dtype == call.v.dtype,
        f"heads are {width} wide, wider than {WIDEST}": width > WIDEST,
        "its mask has four axes": call.mask is not None,
        "its scale is not positive": call.scale <= 0,
        "it has no queries or no keys": 0 in (*call.q.shape, *call.k.shape, *call.v.shape),
        "gradients must flow through it": gradients,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@lru_cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _warn(reason: str) -> None:
    warnings.warn(f"attention is read by plain torch on this GPU, slower than by the kernels: {reason}.", stacklevel=3)
