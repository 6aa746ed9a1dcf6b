"""Checks the jaxtyping shapes in interp's signatures while tests run; other annotations are pyright's business."""

from collections.abc import Callable
from typing import get_args

from beartype import beartype
from jaxtyping import AbstractArray

# these look at what a user hands them and say in their own words what is wrong with it
OWN_WORDS = {"HeadSet.from_mask", "HeadScores.__init__"}


def checked(function: Callable) -> Callable:
    """The function with beartype looking at annotations that name axes, and at no others."""
    own = function.__qualname__ in OWN_WORDS
    kinds = function.__annotations__
    function.__annotations__ = {name: kind for name, kind in kinds.items() if _has_axes(kind) and not own}
    return beartype(function) if function.__annotations__ else function


def _has_axes(kind: object) -> bool:
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        return True
    return any(_has_axes(part) for part in get_args(kind))
