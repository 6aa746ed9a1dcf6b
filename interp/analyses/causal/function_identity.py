"""The identity of a function as JSON: what its numbers depend on."""

import inspect
import pickle
from functools import partial
from typing import Any

from interp.errors import UsageError


def function_identity(function: Any) -> list[Any]:
    """The code of a function and the values that it holds, so that stored numbers of another one are never reused.

    Args:
        function: A metric, a judge or a measure.

    Raises:
        UsageError: If the function holds a value that cannot be pickled.
    """
    try:
        if isinstance(function, partial):
            return [function_identity(function.func), pickle.dumps((function.args, function.keywords)).hex()]
        function = inspect.unwrap(function)
        code = getattr(function, "__code__", None)
        if code is None:
            return [type(function).__module__, type(function).__qualname__, pickle.dumps(function).hex()]
        held = (
            [cell.cell_contents for cell in function.__closure__ or ()], function.__defaults__, function.__kwdefaults__
        )  # fmt: skip
        return [function.__module__, function.__qualname__, _code(code), pickle.dumps(held).hex()]
    except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{function!r} holds a value that cannot be pickled ({error}), so numbers in a folder could belong to "
            "another function; give a function of a module, or no folder."
        ) from None


def _code(code: Any) -> list[Any]:
    """Code without its place in a file."""
    consts = [_code(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), consts, list(code.co_names)]
