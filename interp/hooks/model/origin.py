"""The name of a loaded model and remarks on its weights, kept with the model and never read from its files."""

from typing import Any, NamedTuple

_ATTRIBUTE = "_interp_origin"


class Origin(NamedTuple):
    """Where a model came from.

    Examples:
        >>> from interp.hooks.model.origin import Origin, origin_of
        >>> origin_of(model)
        Origin(name='', note='')
    """

    name: str = ""
    """Name of the model; "" where the path it was loaded from names it."""
    note: str = ""
    """Remark on its weights, such as that they were dequantised."""


def set_origin(model: Any, name: str, note: str = "") -> None:
    """Keep a name and a remark with a model.

    A config would be the wrong place, since `config.json` of a model folder could hold any name.

    Args:
        model: The model.
        name: Its name.
        note: A remark on its weights.
    """
    setattr(model, _ATTRIBUTE, Origin(name, note))


def origin_of(model: Any) -> Origin:
    """The name and the remark that `set_origin` kept with a model; both are "" where there are none.

    Args:
        model: The model.
    """
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Origin) else Origin()
