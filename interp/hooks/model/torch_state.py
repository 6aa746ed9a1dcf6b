"""The state of torch that interp's own code runs in, whatever the caller has set for the model."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
"""Types of devices for which autocast may be on."""


class _SharedSetting:
    """A setting that torch has once in a process: set by the first user, restored after the last one."""

    def __init__(
        self, get: Callable[[], Any], change: Callable[[Any], None], own: Any, fits: Callable[[Any], bool]
    ) -> None:
        self._get, self._change, self._own, self._fits = get, change, own, fits
        self._lock = threading.RLock()
        self._users = 0
        self._caller: Any = own

    @property
    def needed(self) -> bool:
        """Whether the setting differs, or another user has set it."""
        return self._users > 0 or not self._fits(self._get())

    def enter(self) -> None:
        """Set it, if this is the first user."""
        with self._lock:
            if not self._users:
                self._caller = self._get()
                self._change(self._own)
            self._users += 1

    def leave(self) -> None:
        """Restore it, if this is the last user."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._change(self._caller)


_backends: Any = torch.backends


def _precision() -> tuple[str, ...]:
    return _backends.cuda.matmul.fp32_precision, _backends.mkldnn.matmul.fp32_precision


def _set_precision(values: tuple[str, ...]) -> None:
    _backends.cuda.matmul.fp32_precision, _backends.mkldnn.matmul.fp32_precision = values


def _is_exact(values: tuple[str, ...]) -> bool:
    """Whether float32 products are exact; "none" takes the setting of all of torch."""
    return all(value == "ieee" or (value == "none" and _backends.fp32_precision == "none") for value in values)


_dtype = _SharedSetting(
    torch.get_default_dtype, torch.set_default_dtype, torch.float32, lambda dtype: dtype == torch.float32
)
_matmul = _SharedSetting(_precision, _set_precision, ("ieee", "ieee"), _is_exact)


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Run a block with the settings that torch starts with, except whether gradients are recorded.

    The default dtype is float32 and the default device the CPU, matrix products of float32 are exact, and autocast and
    inference mode are off. So numbers of interp, and tensors that it keeps from one forward pass to the next, do not
    depend on what the caller has set for the model.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(own_defaults())
        if _matmul.needed:
            _matmul.enter()
            stack.callback(_matmul.leave)
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            # leaving inference mode would switch gradients on
            stack.enter_context(torch.no_grad())
        yield


@contextlib.contextmanager
def own_defaults() -> Iterator[None]:
    """Run a block that runs the model with a default dtype of float32 and the CPU as the default device."""
    with contextlib.ExitStack() as stack:
        if _dtype.needed:
            _dtype.enter()
            stack.callback(_dtype.leave)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def for_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert the operands of attention as autocast does, where it is on for their device."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)

    def converted(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    return converted(query), converted(key), converted(value)
