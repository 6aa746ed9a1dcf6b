"""Selection of the engine that serves an attention call."""

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

EngineName = Literal["naive", "chunked", "triton"]

ENGINE_NAMES: tuple[EngineName, ...] = ("naive", "chunked", "triton")
MAX_HEAD_WIDTH = 256
"""Largest head width that the Triton kernels support."""
MIN_KEYS_TO_WARN = 4096
"""Number of keys from which a call that falls back to plain torch on a GPU raises a warning."""


@dataclass(frozen=True)
class EngineChoice:
    """The name of the selected engine and the reason for the selection."""

    name: str
    """Name of the engine: "naive", "chunked" or "triton"."""
    reason: str
    """Reason for the selection, in words."""

    @property
    def engine(self) -> Engine:
        """The function that computes attention."""
        if self.name == "triton":
            # this imports triton, which not every machine has
            from interp.kernels.gpu import engine as triton_engine

            return triton_engine.attend
        return {"naive": naive.attend, "chunked": chunked.attend}[self.name]

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def select(call: Call, requests: tuple[Request, ...] = (), force: str | None = None) -> EngineChoice:
    """Select the engine for one call: "triton" on a GPU if the kernels can serve the call, otherwise "chunked".

    A long call on a GPU that the kernels cannot serve raises a warning, once for each reason, because plain torch is
    more than twice as slow there.

    Args:
        call: The attention call.
        requests: The reductions that will be computed. They do not change the selection.
        force: Name of the engine to use instead: "naive", "chunked" or "triton".

    Returns:
        EngineChoice: The engine and the reason for it.

    Raises:
        UsageError: If `force` is not the name of an engine, or if the forced engine cannot serve the call.

    Examples:
        >>> from interp.kernels.contract import Call
        >>> from interp.kernels.select import select
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> print(select(Call(q, q, q, scale=0.5)))
        chunked: plain torch on cpu, memory in proportion to the length
    """
    if force is not None and force not in ENGINE_NAMES:
        raise UsageError(f"unknown engine {force!r}; choose from {', '.join(map(repr, ENGINE_NAMES))}.")
    problem = obstacle(call)
    if force == "triton":
        if problem is not None:
            raise UsageError(f"the Triton kernels cannot serve this call: {problem}; omit `engine` to use another.")
        return EngineChoice(force, "requested by the caller")
    if force is not None:
        return EngineChoice(force, "requested by the caller")
    choice, slow = decide(call.q.device.type, problem, call.sizes[4])
    if slow:
        _warn(str(problem))
    return choice


def decide(device: str, problem: str | None, keys: int) -> tuple[EngineChoice, bool]:
    """Select the engine from the type of device and the obstacle.

    Args:
        device: Type of device, such as "cuda" or "cpu".
        problem: Why the Triton kernels cannot serve the call; None if they can.
        keys: Number of keys of the call.

    Returns:
        tuple: The engine, and whether it is slow for this number of keys.
    """
    if device == "cuda" and problem is None:
        return EngineChoice("triton", "one pass on the GPU gives the output and its reductions"), False
    reason = f"; the Triton kernels do not serve it: {problem}" if device == "cuda" else ""
    choice = EngineChoice("chunked", f"plain torch on {device}, memory in proportion to the length{reason}")
    return choice, device == "cuda" and keys >= MIN_KEYS_TO_WARN


def usual(device: torch.device) -> str:
    """Return the name of the engine that serves an ordinary call on a device.

    Args:
        device: The device of q, k and v.

    Returns:
        str: "triton" or "chunked".
    """
    return "triton" if device.type == "cuda" and _installed() else "chunked"


def obstacle(call: Call) -> str | None:
    """Return why the Triton kernels cannot serve a call.

    Args:
        call: The attention call.

    Returns:
        str | None: The reason in words; None if the kernels can serve the call.
    """
    width = max(call.q.shape[-1], call.v.shape[-1])
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
    reasons = {
        "triton is not installed": not _installed(),
        f"its tensors are on the {call.q.device.type}, and the kernels need a GPU": not _runs_on(call.q.device),
        f"{call.q.dtype} is not float16, bfloat16 or float32": call.q.dtype
        not in (torch.float16, torch.bfloat16, torch.float32),
        "q, k and v differ in dtype": not call.q.dtype == call.k.dtype == call.v.dtype,
        f"heads are {width} wide, wider than {MAX_HEAD_WIDTH}": width > MAX_HEAD_WIDTH,
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
    message = f"attention is computed by plain torch on this GPU, which is slower than the Triton kernels: {reason}."
    warnings.warn(message, stacklevel=3)
