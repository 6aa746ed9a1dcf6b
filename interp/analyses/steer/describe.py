"""Edits as text."""

from interp.hooks.edit.edit import Edit, Edits

_NOT_SHOWN = ("edit", "heads", "spans", "vectors", "bias")


def describe(edit: Edit | Edits) -> str:
    """An edit as text, without its heads and spans.

    Settings are shown where they differ from the default, numbers always.

    Args:
        edit: An edit, or several added up.

    Examples:
        >>> interp.steer.describe(interp.steer.Pasta("first", heads="L1"))
        'Pasta(alpha=0.01)'
    """
    texts = []
    for part in Edits(()) + edit:
        settings = {name: value for name, value in part.to_dict().items() if name not in _NOT_SHOWN}
        defaults = {name: f.default for name, f in type(part).__dataclass_fields__.items()}
        shown = [f"{k}={v}" for k, v in settings.items() if v != defaults.get(k) or isinstance(v, float)]
        texts.append(f"{type(part).__name__}({', '.join(shown)})")
    return " + ".join(texts)
