"""Which engine serves an attention call, and why."""

from dataclasses import dataclass
from typing import Literal

from interp.kernels import chunked, naive
from interp.kernels.contract import Call, Engine, Request
from interp.kernels.errors import UsageError

Name = Literal["naive", "chunked"]

DEFAULT: Name = "chunked"
ENGINES: dict[str, Engine] = {"naive": naive.attend, "chunked": chunked.attend}


@dataclass(frozen=True)
class Choice:
    """An engine's name and the reason for it, in words."""

    name: str
    why: str

    @property
    def engine(self) -> Engine:
        return ENGINES[self.name]

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def select(call: Call, requests: tuple[Request, ...] = (), force: str | None = None) -> Choice:
    """The engine for one call. `force` names it; otherwise chunked torch serves every device, dtype and length.

    Raises UsageError for an engine that does not exist.
    """
    if force is not None:
        if force not in ENGINES:
            raise UsageError(f"engine {force!r} does not exist: take one of {', '.join(sorted(ENGINES))}.")
        return Choice(force, "named by the caller")
    return Choice(DEFAULT, f"plain torch on {call.q.device.type}, memory in proportion to the length")
