"""The error of a broken contract."""

from typing import Any

from interp.errors import InterpError


class ContractError(InterpError, AssertionError):
    """A method does not keep a contract that `interp.testing` checks."""


def require(holds: object, message: str) -> None:
    """Raise ContractError with a message unless something holds."""
    if not holds:
        raise ContractError(message)


def modules_with_hooks(model: Any) -> list[str]:
    """Names of the modules of a model that have hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]
