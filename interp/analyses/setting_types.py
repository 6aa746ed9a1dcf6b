"""Types of settings: whether a value, as JSON gives it, is of the type that an annotation names."""

from typing import Any

_PLAIN: dict[str, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}


def fits(value: Any, annotation: str) -> bool:
    """Whether a value is of one of the plain types that an annotation names.

    Args:
        value: A value, such as 0.5 or "all".
        annotation: Types separated by " | ", such as "float | str". Any value fits one that names other types.

    Examples:
        >>> from interp.analyses.setting_types import fits
        >>> fits(2, "float"), fits("much", "float"), fits(True, "int")
        (True, False, False)
    """
    options = annotation.split(" | ")
    if not set(options) <= set(_PLAIN):
        return True
    return any(isinstance(value, _PLAIN[each]) and (each == "bool" or type(value) is not bool) for each in options)
